"""cuBLASLt by its C interface: products without split-K, through no global setting of torch's.

torch.mm cannot be told to leave K whole for one call alone: its flags are the process's, so another
thread's stock products would follow them. Here a plan (shapes, leading dimensions, and the
algorithm that cuBLASLt's heuristic names when it may use no reduction scheme and no workspace) is
made once and then launched on the current stream, which a CUDA graph captures as any other kernel.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from functools import cache
from typing import NamedTuple

import torch

# Values of cublasLt.h and library_types.h, the same in CUDA 12 and 13.
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_COMPUTE_32F, _SCALE_32F = 68, 0
_TRANSPOSE_A = 3  # of a product's description
_MAX_WORKSPACE, _REDUCTION_SCHEMES = 1, 3  # of a search for algorithms


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8), ("workspace", c_size_t), ("status", c_int),
        ("waves", c_float), ("reserved", c_int * 4),
    )  # fmt: skip


class _Plan(NamedTuple):
    product: c_void_p
    w: c_void_p
    x: c_void_p
    addend: c_void_p
    y: c_void_p
    algorithm: _Found


class UnavailableError(RuntimeError):
    """cuBLASLt is not there, or has no such algorithm."""


@cache
def library() -> ctypes.CDLL:
    """The one that torch has loaded. Raises UnavailableError."""
    if torch.version.cuda is None:
        raise UnavailableError("torch is built without CUDA")
    try:
        return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    except OSError as error:
        raise UnavailableError(str(error)) from None


def version() -> int:
    """As cuBLASLt counts: 130101 is 13.1.1."""
    get = library().cublasLtGetVersion
    get.restype = c_size_t
    return int(get())


_lock = threading.Lock()
_handles: dict[torch.device, c_void_p] = {}
_plans: dict[tuple[object, ...], _Plan] = {}
_ONE, _ZERO = c_float(1), c_float(0)


def product(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, addend: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x @ w.T + addend for x [M, K], w [N, K], y and addend [M, N], all on one device.

    Rows are contiguous and at least one; y and addend share a dtype, that of x or fp32.
    Raises UnavailableError.
    """
    c = y if addend is None else addend
    key = (x.device, x.dtype, y.dtype, *x.shape, w.shape[0], *map(_leading, (x, w, y, c)))
    plan = _plans.get(key) or _make_plan(key, x, w, y, c)
    with torch.cuda.device(x.device):
        _call(
            "cublasLtMatmul", _handles[x.device], plan.product, byref(_ONE),
            c_void_p(w.data_ptr()), plan.w, c_void_p(x.data_ptr()), plan.x,
            byref(_ZERO if addend is None else _ONE), c_void_p(c.data_ptr()), plan.addend,
            c_void_p(y.data_ptr()), plan.y, byref(plan.algorithm), None, c_size_t(0),
            c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
        )  # fmt: skip
    return y


def _make_plan(
    key: tuple[object, ...], x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, c: torch.Tensor
) -> _Plan:
    with _lock, torch.cuda.device(x.device):
        if x.device not in _handles:
            _handles[x.device] = _made("cublasLtCreate")
        # cuBLASLt counts by column: y^T [N, M] = w x^T, where w^T and x^T lie in memory.
        operation = _made("cublasLtMatmulDescCreate", c_int(_COMPUTE_32F), c_int(_SCALE_32F))
        transposed = c_int(1)
        _call(
            "cublasLtMatmulDescSetAttribute", operation, c_int(_TRANSPOSE_A), byref(transposed),
            c_size_t(sizeof(transposed)),
        )  # fmt: skip
        layouts = _layout(w), _layout(x), _layout(c), _layout(y)
        found = _search(_handles[x.device], operation, *layouts)
        plan = _plans[key] = _Plan(operation, *layouts, found)
        return plan


def _leading(rows: torch.Tensor) -> int:
    return max(rows.stride(0), rows.shape[1])  # The stride of a single row means nothing.


def _layout(rows: torch.Tensor) -> c_void_p:
    n_rows, n_columns = rows.shape
    return _made(
        "cublasLtMatrixLayoutCreate", c_int(_TYPES[rows.dtype]), c_uint64(n_columns),
        c_uint64(n_rows), c_int64(_leading(rows)),
    )  # fmt: skip


def _search(handle: c_void_p, operation: c_void_p, *layouts: c_void_p) -> _Found:
    """The first choice among algorithms that reduce nothing between blocks."""
    wish = _made("cublasLtMatmulPreferenceCreate")
    for attribute, value in ((_MAX_WORKSPACE, c_uint64(0)), (_REDUCTION_SCHEMES, c_uint32(0))):
        _call(
            "cublasLtMatmulPreferenceSetAttribute", wish, c_int(attribute), byref(value),
            c_size_t(sizeof(value)),
        )  # fmt: skip
    found, count = _Found(), c_int(0)
    _call(
        "cublasLtMatmulAlgoGetHeuristic", handle, operation, *layouts, wish, c_int(1),
        byref(found), byref(count),
    )  # fmt: skip
    _call("cublasLtMatmulPreferenceDestroy", wish)
    if count.value == 0 or found.status:
        raise UnavailableError("cuBLASLt has no algorithm for it without split-K")
    return found


def _made(function: str, *args: object) -> c_void_p:
    made = c_void_p()
    _call(function, byref(made), *args)
    return made


def _call(function: str, *args: object) -> None:
    status = getattr(library(), function)(*args)
    if status:
        raise UnavailableError(f"{function} gave status {status}")
