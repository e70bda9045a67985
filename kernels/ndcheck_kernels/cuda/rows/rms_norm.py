"""RMSNorm over the last dimension, alone or fused with the residual addition before it.

Computes: y = x * rsqrt(mean(x**2) + eps) * weight in fp32, one rounding at the end. With a
    residual: h = round(x + residual) is written as well, and y is computed from the rounded h, so
    fusing costs no bits.
Reduction order: one program holds the whole row in a tile of `row_tile(N)`; the sum of squares is
    one `tl.sum` over that tile.
Depends on: N, dtype, architecture, Triton version.
Dtypes: bfloat16, float16, float32; weight may have another of them. N up to 65536.
Not claimed: gradients; the bits of modules that round before they multiply by the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import row_tile
from ndcheck_kernels.cuda.dependent_launch import follow, pdl


@triton.jit(do_not_specialize=["M"])
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, M, N, stride_xm, stride_rm, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    offs_n = tl.arange(0, BLOCK)[None, :]
    mask = (offs_m < M) & (offs_n < N)
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n, mask, other=0.0)  # [ROWS, BLOCK]
    weight = x
    if HAS_WEIGHT:  # Not after the sum: it takes long.
        weight = tl.load(weight_ptr + offs_n, offs_n < N, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offs_m * stride_rm + offs_n, mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(h_ptr + offs_m * N + offs_n, x, mask)
    x = x.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / N + eps)
    if HAS_WEIGHT:
        y *= weight.to(tl.float32)
    tl.store(y_ptr + offs_m * N + offs_n, y.to(y_ptr.dtype.element_ty), mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6
) -> torch.Tensor:
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(h), h) for h = x + residual."""
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, unlike x")
    return _launch(x, residual, weight, eps)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    device.require_float("rms_norm", x, weight)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = y if residual is None else torch.empty_like(y)
    if y.numel() == 0:
        return y, h
    rows = device.aligned_rows(x)
    residual_rows = rows if residual is None else device.aligned_rows(residual)
    weight_row = rows if weight is None else device.aligned_rows(weight)
    (m, n), tile = rows.shape, row_tile(rows.shape[1])
    _rms_norm_kernel[(triton.cdiv(m, tile.rows),)](
        rows, residual_rows, weight_row, y, h, m, n, rows.stride(0), residual_rows.stride(0), eps,
        HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None,
        ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
        enable_fp_fusion=True, **pdl(y.device),
    )  # fmt: skip
    return y, h
