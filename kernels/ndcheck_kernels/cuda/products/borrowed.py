"""Products borrowed from cuBLASLt, where they were seen to have the bits of ours.

Computes: what `matmul.matmul` does, by cuBLASLt without split-K. A shape of two K-groups is two
    fp32 products of half of K and one rounded addition.
Reduction order: cuBLASLt's own; that it is ours is a property of its version and the GPU. So a
    shape is borrowed for a number of rows only after a *proof* on this machine: on operands whose
    exact result is 0, so that the result is all rounding, every element must come out as our kernel
    has it; and the same product with K in another order must not, or the operands tell nothing.
    Proofs are kept on disk by everything that could change bits. Where one fails, the shape is
    computed by our kernel from then on, and a warning says so.
Depends on: as `matmul`.
Dtypes: bfloat16, float16.
Not claimed: that it is faster. `configs.borrows` says where it was, on an H200.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
import triton

from ndcheck_kernels.cuda.configs import chunk_length
from ndcheck_kernels.cuda.products import cublaslt

Ours = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x [M, K], w [N, K], addend [M, N] or None -> [M, N], by our kernel."""

ALIGNMENT = 256
"""Bytes: what cuBLASLt's choice of an algorithm takes for granted."""
_SOURCES = ("matmul.py", "tiles.py", "borrowed.py", "cublaslt.py", "../configs.py")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a proof is of, beside the number of rows."""

    n: int
    k: int
    dtype: str
    groups: int
    has_addend: bool

    def __str__(self) -> str:
        addend = " + addend" if self.has_addend else ""
        return f"{self.dtype} {self.n}x{self.k} in {self.groups}{addend}"


@dataclass(slots=True)
class Proofs:
    """What was seen on one device: by shape, the numbers of rows with our bits, and why not."""

    path: Path
    environment: dict[str, str]
    proven: dict[str, set[int]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, environment: dict[str, str]) -> Proofs:
        """Those kept for this environment; none if the file is missing or damaged."""
        digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()
        proofs = cls(cache_folder() / f"borrowed-{digest[:16]}.json", environment)
        proofs.merge()
        return proofs

    def merge(self) -> None:
        """Add what other processes have kept meanwhile."""
        try:
            kept = json.loads(self.path.read_text())
            if kept["environment"] != self.environment:
                return
            proven = {str(s): {int(m) for m in rows} for s, rows in kept["proven"].items()}
            failed = {str(s): str(reason) for s, reason in kept["failed"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        for shape, rows in proven.items():
            self.proven.setdefault(shape, set()).update(rows)
        self.failed = failed | self.failed

    def write(self) -> None:
        """Whole or not at all; a folder that cannot be written to costs a proof a process."""
        self.merge()
        document = {
            "environment": self.environment,
            "proven": {shape: sorted(rows) for shape, rows in sorted(self.proven.items())},
            "failed": dict(sorted(self.failed.items())),
        }
        part = self.path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(document, indent=1))
            part.replace(self.path)
        except OSError:
            part.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where proofs are kept: XDG's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ndcheck"


@cache
def environment(device: torch.device) -> dict[str, str]:
    """Everything that a product's bits may follow."""
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in _SOURCES)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "cublaslt": str(cublaslt.version()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ndcheck": _version(),
        "kernels": hashlib.sha256(sources).hexdigest()[:16],
    }


def _version() -> str:
    """Of the package that these kernels came in; the digest of their sources says more."""
    try:
        return metadata.version("ndcheck")
    except metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """The kernel module's version where Linux says it, else the CUDA version that it supports."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]


_lock = threading.RLock()
_proofs: dict[torch.device, Proofs] = {}
_verdicts: dict[tuple[object, ...], bool] = {}
_settled = False


def proofs(device: torch.device) -> Proofs:
    """What is known of a device. Raises cublaslt.UnavailableError."""
    with _lock:
        if device not in _proofs:
            _proofs[device] = Proofs.read(environment(device))
        return _proofs[device]


def settle(settled: bool = True) -> None:
    """Try no more in this process: a server's requests do not wait for proofs."""
    global _settled
    _settled = settled


def _is_on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def fits(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, addend: torch.Tensor | None) -> bool:
    """Whether cuBLASLt can take these as they lie."""
    if not _is_on_gpu(x):
        return False
    tensors = [t for t in (x, w, y, addend) if t is not None]
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and all(t.dtype == x.dtype and t.dim() == 2 and t.stride(1) == 1 for t in tensors)
        and all(t.stride(0) >= t.shape[1] and t.data_ptr() % ALIGNMENT == 0 for t in tensors)
        and all(t.stride(0) * t.element_size() % 16 == 0 for t in tensors)
    )


def is_proven(
    x: torch.Tensor, w: torch.Tensor, addend: torch.Tensor | None, groups: int, ours: Ours
) -> bool:
    """Whether the borrowed product of these shapes has our bits; tried if that is not known.

    Nothing is tried while a CUDA graph is captured, or after `settle`: what is unknown then is not
    borrowed.
    """
    key = (x.device, x.dtype, *x.shape, w.shape[0], groups, addend is None)
    verdict = _verdicts.get(key)
    if verdict is None:
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if _settled or capturing:
            return False
        with _lock:
            verdict = _verdicts[key] = _try(x, w, addend, groups, ours)
    return verdict


def _try(
    x: torch.Tensor, w: torch.Tensor, addend: torch.Tensor | None, groups: int, ours: Ours
) -> bool:
    (m, k), n = x.shape, w.shape[0]
    shape = Shape(n, k, str(x.dtype).removeprefix("torch."), groups, addend is not None)
    try:
        known = proofs(x.device)
    except cublaslt.UnavailableError as error:
        _warn_once(f"no products are borrowed from cuBLASLt: {error}")
        return False
    if str(shape) not in known.failed and m not in known.proven.get(str(shape), ()):
        try:
            reason = prove(shape, m, x.device, ours)
        except torch.OutOfMemoryError:
            return False  # It says nothing about the shape, and another process may have room.
        if reason is None:
            known.proven.setdefault(str(shape), set()).add(m)
        else:
            known.failed[str(shape)] = reason
        known.write()
    if (reason := known.failed.get(str(shape))) is not None:
        _warn_once(f"{shape} is not borrowed from cuBLASLt: {reason}; our kernel computes it")
        return False
    return True


def prove(shape: Shape, m: int, device: torch.device, ours: Ours) -> str | None:
    """Why `m` rows of a shape cannot be borrowed, or None: they have the bits of ours."""
    generator = torch.Generator(device).manual_seed(m)

    def draw(*size: int) -> torch.Tensor:
        dtype = getattr(torch, shape.dtype)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    half = shape.k // 2
    order = torch.randperm(shape.k, generator=generator, device=device)
    a, b = draw(m, shape.k - half), draw(shape.n, shape.k - half)
    a *= torch.randint(-5, 6, a.shape, generator=generator, device=device).exp2()
    # The exact product is 0 (of an odd K, its last term): what is left tells the order.
    x = torch.cat([a, a[:, :half]], 1)[:, order].contiguous()
    w = torch.cat([b, -b[:, :half]], 1)[:, order].contiguous()
    addend = draw(m, shape.n) * 2.0**-8 if shape.has_addend else None
    try:
        got = product(x, w, x.new_empty(m, shape.n), addend, shape.groups)
        if not torch.equal(got, ours(x, w, addend)):
            return f"cuBLASLt has other bits at {m} rows"
        x, w = x.flip(1), w.flip(1)
        other = product(x, w, x.new_empty(m, shape.n), addend, shape.groups)
    except cublaslt.UnavailableError as error:
        return str(error)
    return "another order of K has the same bits" if torch.equal(got, other) else None


def product(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, addend: torch.Tensor | None, groups: int
) -> torch.Tensor:
    """y = x @ w.T + addend in `groups` K-groups, for what `fits`. Raises UnavailableError."""
    if groups == 1:
        return cublaslt.product(x, w, y, addend)
    if groups != 2 or addend is not None:
        raise cublaslt.UnavailableError("only two K-groups, without an addend")
    half = chunk_length(x.shape[1], groups)
    parts = [torch.empty(y.shape, dtype=torch.float32, device=y.device) for _ in range(2)]
    cublaslt.product(x[:, :half], w[:, :half], parts[0])
    cublaslt.product(x[:, half:], w[:, half:], parts[1])
    return torch.add(*parts, out=y)


def summary(device: torch.device) -> str:
    """What is known of a device, in one line."""
    try:
        known = proofs(torch.empty(0, device=device).device)  # With its number.
    except cublaslt.UnavailableError as error:
        return f"no products borrowed: {error}"
    counts = sum(map(len, known.proven.values()))
    refused = "".join(f"; not {shape}: {why}" for shape, why in sorted(known.failed.items()))
    return (
        f"cuBLASLt {known.environment['cublaslt']}: {len(known.proven)} shapes have our bits, "
        f"seen at {counts} numbers of rows{refused}"
    )


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=2)
