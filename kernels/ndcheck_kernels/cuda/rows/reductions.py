"""sum and mean over any dimensions, and running sums.

Computes: sum(x) and sum(x) / count, and the sum of each element and those before it, in fp32 with
    one rounding at the end.
Reduction order: the reduced dimensions are flattened to N. A row is cut into CHUNK elements; a
    chunk is one tile of `row_tile(CHUNK or N)` added by one `tl.sum`; the chunks' fp32 sums are
    reduced the same way until one is left. A running sum is one `tl.cumsum` over each RUN elements,
    added to the `tl.sum` of those before it, taken RUN by RUN.
Depends on: N (a running sum: only its place), dtype, architecture, Triton version.
Dtypes: bfloat16, float16, float32; `dtype` chooses the output's among them.
Not claimed: gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import row_tile
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.ops.shapes import reduced_dims

CHUNK = 16384
RUN = 1024


@triton.jit(do_not_specialize=["M"])
def _sum_kernel(
    x_ptr,
    y_ptr,
    M,
    N,
    stride_xm,
    count,
    chunks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (offs_m < M) & (offs_n < N)
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n, mask, other=0.0).to(tl.float32)
    y = tl.sum(x, axis=1, keep_dims=True) / count  # [ROWS, 1]
    y_ptrs = y_ptr + offs_m * chunks + tl.program_id(1)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), offs_m < M)


# Known to be divisible, they would change the layout, and with it the order within a run.
@triton.jit(do_not_specialize=["N", "stride_xm"])
def _cumsum_kernel(x_ptr, y_ptr, N, stride_xm, RUN: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    m = tl.program_id(0).to(tl.int64)
    total = 0.0
    for first in range(0, N, RUN):
        offs = first + tl.arange(0, RUN)
        x = tl.load(x_ptr + m * stride_xm + offs, offs < N, other=0.0).to(tl.float32)
        y = total + tl.cumsum(x, 0)
        tl.store(y_ptr + m * N + offs, y.to(y_ptr.dtype.element_ty), offs < N)
        total += tl.sum(x, 0)


def cumsum(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Running sums along a dimension, in x's shape."""
    x = x if dtype is None else x.to(dtype)
    device.require_float("cumsum", x)
    if x.numel() == 0 or x.dim() == 0:
        return x.clone()
    rows = device.aligned_rows(x.movedim(dim, -1))
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    _cumsum_kernel[(len(rows),)](
        rows, y, rows.shape[1], rows.stride(0), RUN=RUN, num_warps=4, enable_fp_fusion=True,
        **pdl(x.device),
    )  # fmt: skip
    return y.view(x.movedim(dim, -1).shape).movedim(-1, dim)


def sum(
    x: torch.Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    return _reduce(x, dim, keepdim, dtype, averaged=False)


def mean(
    x: torch.Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    return _reduce(x, dim, keepdim, dtype, averaged=True)


def _reduce(
    x: torch.Tensor, dim: int | Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None,
    *, averaged: bool,
) -> torch.Tensor:  # fmt: skip
    x = device.converted(x, dtype)
    rows, kept = _to_rows(x, dim)
    y = torch.empty(rows.shape[0], dtype=dtype or x.dtype, device=x.device)
    device.require_float("mean" if averaged else "sum", x, y)
    count = float(rows.shape[1]) if averaged else 1.0
    if rows.shape[1] == 0:
        y.fill_(float("nan") if averaged else 0.0)
    elif rows.shape[0]:
        _sum_rows(rows, y, count)
    return _from_rows(y, x, kept, keepdim)


def _sum_rows(rows: torch.Tensor, y: torch.Tensor, count: float) -> None:
    m, n = rows.shape
    chunks = triton.cdiv(n, CHUNK)
    parts = y if chunks == 1 else torch.empty((m, chunks), dtype=torch.float32, device=y.device)
    tile = row_tile(min(n, CHUNK))
    _sum_kernel[(triton.cdiv(m, tile.rows), chunks)](
        rows, parts, m, n, rows.stride(0), count if chunks == 1 else 1.0, chunks,
        ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
        enable_fp_fusion=True, **pdl(rows.device),
    )  # fmt: skip
    if chunks > 1:
        _sum_rows(device.aligned_rows(parts), y, count)


def _to_rows(x: torch.Tensor, dim: int | Sequence[int] | None) -> tuple[torch.Tensor, list[int]]:
    """x as [kept, reduced] and the kept dimensions; no dimension named means all are reduced."""
    reduced = reduced_dims(x, dim)
    kept = [d for d in range(x.dim()) if d not in reduced]
    m = math.prod(x.shape[d] for d in kept)
    n = math.prod(x.shape[d] for d in reduced)
    rows = x.permute(*kept, *reduced).reshape(m, n)
    return (device.aligned_rows(rows) if rows.numel() else rows), kept


def _from_rows(y: torch.Tensor, x: torch.Tensor, kept: list[int], keepdim: bool) -> torch.Tensor:
    if keepdim:
        return y.reshape([size if d in kept else 1 for d, size in enumerate(x.shape)])
    return y.reshape([x.shape[d] for d in kept])
