"""softmax, log_softmax and logsumexp over one dimension.

Computes: with m = max(x) and s = sum(exp(x - m)) in fp32: exp(x - m) / s, x - m - log(s) and
    m + log(s), one rounding at the end.
Reduction order: N up to ONE_TILE: the row is one tile of `row_tile(N)` and s is one `tl.sum`.
    Longer rows: every lane of a LANES-wide tile keeps its own maximum and sum over its column
    n, n + LANES, n + 2 LANES, ... in ascending order; the lanes are scaled to the row's maximum
    and added by one `tl.sum`.
Depends on: N, dtype, architecture, Triton version.
Dtypes: bfloat16, float16, float32; `dtype` chooses the output's among them.
Not claimed: gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import row_tile
from ndcheck_kernels.cuda.dependent_launch import follow, pdl

ONE_TILE = 16384
LANES = 8192


@triton.jit
def _write(x, m, s, MODE: tl.constexpr):
    if MODE == "softmax":
        return tl.exp(x - m) / s
    else:  # noqa: RET505 - the jit compiler needs both branches
        return x - m - tl.log(s)


@triton.jit
def _undefined(s, m, MODE: tl.constexpr):
    """The sum, but NaN where a row holds +inf: its shares are undefined, its logsumexp is not."""
    if MODE == "logsumexp":
        return s
    else:  # noqa: RET505 - the jit compiler needs both branches
        return tl.where(m == float("inf"), float("nan"), s)


@triton.jit
def _finite(m):
    """A maximum that can be subtracted: an infinite one would make inf - inf."""
    return tl.where((m == float("-inf")) | (m == float("inf")), 0.0, m)


@triton.jit(do_not_specialize=["M"])
def _softmax_kernel(
    x_ptr,
    y_ptr,
    M,
    N,
    stride_xm,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    offs_n = tl.arange(0, BLOCK)[None, :]
    mask = (offs_m < M) & (offs_n < N)
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n, mask, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=1, keep_dims=True)  # [ROWS, 1]
    m = _finite(top)
    s = _undefined(tl.sum(tl.exp(x - m), axis=1, keep_dims=True), top, MODE)
    if MODE == "logsumexp":
        tl.store(y_ptr + offs_m, (m + tl.log(s)).to(y_ptr.dtype.element_ty), offs_m < M)
    else:
        y = _write(x, m, s, MODE)
        tl.store(y_ptr + offs_m * N + offs_n, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M"])
def _long_softmax_kernel(
    x_ptr, y_ptr, M, N, stride_xm, MODE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    lane_m = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    lane_s = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs_n, offs_n < N, other=float("-inf")).to(tl.float32)
        new_m = tl.maximum(lane_m, x)
        lane_s = lane_s * tl.exp(lane_m - _finite(new_m)) + tl.exp(x - _finite(new_m))
        lane_m = new_m
    top = tl.max(lane_m, axis=0)
    m = _finite(top)
    s = _undefined(tl.sum(lane_s * tl.exp(lane_m - m), axis=0), top, MODE)
    if MODE == "logsumexp":
        tl.store(y_ptr + row, (m + tl.log(s)).to(y_ptr.dtype.element_ty))
    else:
        for start in range(0, N, BLOCK):
            offs_n = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offs_n, offs_n < N, other=0.0).to(tl.float32)
            y = _write(x, m, s, MODE)
            tl.store(y_ptr + row * N + offs_n, y.to(y_ptr.dtype.element_ty), offs_n < N)


def softmax(x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    return _launch(x, dim, dtype, "softmax")


def log_softmax(x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    return _launch(x, dim, dtype, "log_softmax")


def logsumexp(x: torch.Tensor, dim: int = -1, keepdim: bool = False) -> torch.Tensor:
    y = _launch(x, dim, None, "logsumexp")
    return y if keepdim or x.dim() == 0 else y.squeeze(dim)


def _launch(x: torch.Tensor, dim: int, dtype: torch.dtype | None, mode: str) -> torch.Tensor:
    if x.dim() == 0:
        return _launch(x[None], dim, dtype, mode)[0]
    x = device.converted(x, dtype).movedim(dim, -1)
    shape = (*x.shape[:-1], 1) if mode == "logsumexp" else x.shape
    y = torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
    device.require_float(mode, x, y)
    if x.shape[-1] == 0:
        y.fill_(float("-inf"))  # logsumexp of nothing; the others have no element
    elif y.numel():
        rows = device.aligned_rows(x)
        m, n = rows.shape
        if n <= ONE_TILE:
            tile = row_tile(n)
            _softmax_kernel[(triton.cdiv(m, tile.rows),)](
                rows, y, m, n, rows.stride(0), MODE=mode, ROWS=tile.rows, BLOCK=tile.block,
                num_warps=tile.warps, enable_fp_fusion=True, **pdl(y.device),
            )  # fmt: skip
        else:
            _long_softmax_kernel[(m,)](
                rows, y, m, n, rows.stride(0), MODE=mode, BLOCK=LANES, num_warps=16,
                enable_fp_fusion=True, **pdl(y.device),
            )  # fmt: skip
    return y.movedim(-1, dim)
