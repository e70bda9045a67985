"""LayerNorm over the last dimension.

Computes: y = (x - mean(x)) * rsqrt(mean((x - mean(x))**2) + eps) * weight + bias in fp32, one
    rounding at the end.
Reduction order: one program holds the whole row in a tile of `row_tile(N)`; the mean and then the
    centred sum of squares are one `tl.sum` each over that tile.
Depends on: N, dtype, architecture, Triton version.
Dtypes: bfloat16, float16, float32. N up to 65536.
Not claimed: gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import row_tile
from ndcheck_kernels.cuda.dependent_launch import follow, pdl


@triton.jit(do_not_specialize=["M"])
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, M, N, stride_xm, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    offs_n = tl.arange(0, BLOCK)[None, :]
    mask_n = offs_n < N
    mask = (offs_m < M) & mask_n
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n, mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1, keep_dims=True) / N  # [ROWS, 1]
    centred = tl.where(mask_n, x - mean, 0.0)  # [ROWS, BLOCK]
    y = centred * tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / N + eps)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + offs_n, mask_n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_m * N + offs_n, y.to(y_ptr.dtype.element_ty), mask)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:  # fmt: skip
    device.require_float("layer_norm", x, weight, bias)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = device.aligned_rows(x)
    weight_row = rows if weight is None else device.aligned_rows(weight)
    bias_row = rows if bias is None else device.aligned_rows(bias)
    (m, n), tile = rows.shape, row_tile(rows.shape[1])
    _layer_norm_kernel[(triton.cdiv(m, tile.rows),)](
        rows, weight_row, bias_row, y, m, n, rows.stride(0), eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
        enable_fp_fusion=True, **pdl(y.device),
    )  # fmt: skip
    return y
