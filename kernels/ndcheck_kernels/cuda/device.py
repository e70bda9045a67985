"""What the launchers ask of a device: its architecture, its size, and zeroed counters."""

from __future__ import annotations

from functools import cache

import torch
import triton

INTERPRETED_CAPABILITY = 90  # the interpreter stands in for the architecture the tables know best
_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
_COUNTERS = 1 << 22
_PER_STREAM = 1 << 13


def interpreting() -> bool:
    return bool(triton.knobs.runtime.interpret)


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def capability(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; 0 for an AMD GPU, whose numbers mean others."""
    if device.type == "cuda" and torch.version.hip is not None:
        return 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if interpreting():
        return INTERPRETED_CAPABILITY
    raise RuntimeError(
        f"the Triton kernels need a CUDA tensor, not one on {device}: use ndcheck_kernels.cpu, "
        "or set TRITON_INTERPRET=1 before the first import to run them slowly without a GPU"
    )


def has_hopper_kernels(device: torch.device) -> bool:
    """Those that are scheduled by hand, in Gluon, as Triton has it from 3.6 on."""
    return on_gpu(device) and capability(device) == 90 and _TRITON >= (3, 6)


@cache
def sm_count(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Pool:
    """Counters that kernels leave at zero, handed out so that no two running kernels share any."""

    def __init__(self, device: torch.device) -> None:
        self.zeros = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        self.used = 0
        self.by_stream: dict[int, torch.Tensor] = {}

    def take(self, n: int) -> torch.Tensor | None:
        if self.used + n > _COUNTERS:
            return None
        self.used += n
        return self.zeros[self.used - n : self.used]


_pools: dict[torch.device, _Pool] = {}


def counters(n: int, device: torch.device) -> torch.Tensor:
    """n zeroed int32 counters; the kernel that takes them must leave them at zero."""
    if device.type != "cuda":
        return torch.zeros(n, dtype=torch.int32)
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _pools and not capturing:
        _pools[device] = _Pool(device)
    pool = _pools.get(device)
    mine: torch.Tensor | None = None
    if pool is not None and capturing:
        mine = pool.take(n)  # a graph keeps its own for good: it may replay on any stream
    elif pool is not None and n <= _PER_STREAM:
        stream = torch.cuda.current_stream(device).cuda_stream
        mine = pool.by_stream.get(stream)
        if mine is None and (mine := pool.take(_PER_STREAM)) is not None:
            pool.by_stream[stream] = mine
    return torch.zeros(n, dtype=torch.int32, device=device) if mine is None else mine


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, n] that loads in the same pattern whatever view it came from.

    A kernel's layout, and with it the order inside `tl.sum`, follows what the compiler knows about
    alignment. Alignment may therefore depend on n alone: any other view is copied first.
    """
    rows = x.reshape(-1, x.shape[-1])
    regular = rows.stride(0) == rows.shape[1] or (rows.shape[1] % 16 == rows.stride(0) % 16 == 0)
    if rows.stride(1) == 1 and regular and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def converted(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """x as torch converts it before it reduces to `dtype`; a kernel widens by itself, exactly."""
    widens = dtype == torch.float32 and x.is_floating_point() and x.element_size() == 2
    return x if dtype is None or widens else x.to(dtype)


FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def require_float(op: str, *tensors: torch.Tensor | None) -> None:
    for t in tensors:
        if t is not None and t.dtype not in FLOATS:
            raise TypeError(f"{op} takes bfloat16, float16 or float32, not {t.dtype}")
