"""RMSNorm with the bits of the ops that transformers' modules write it in, as one launch.

Computes: y = x * rsqrt(mean(x * x) + eps) in fp32, each operation rounded by itself, then times the
    weight, in one of the ways of `Weighting`.
Reduction order: that of `reductions.mean` over fp32 squares, which is one `tl.sum` over a tile of
    `row_tile(N)` in the layout that loads of float32 have, whatever is loaded here.
Depends on: N, architecture, Triton version.
Dtypes: bfloat16, float16, float32; the weight has that of the result. N up to `reductions.CHUNK`.
Not claimed: gradients; that torch's ops and these instructions agree on every device, so
    `models.rows.norms` compares the bits of each module before it uses this.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import row_tile
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.cuda.rows.reductions import CHUNK


class Weighting(IntEnum):
    """How a row meets the weight w."""

    ROUNDED = 0
    """w * y, y rounded before: Llama's."""
    WIDE = 1
    """w * y in fp32, rounded once: Nemotron-H's."""
    OFFSET = 2
    """(1 + w) * y in fp32, rounded once: Gemma's and Qwen3.5's."""


# Not `enable_fp_fusion`: squares are rounded before they are added, as ops of their own are.
@triton.jit(do_not_specialize=["M"])
def _composed_norm_kernel(
    x_ptr, weight_ptr, y_ptr, M, N, stride_xm, count, eps, WEIGHTING: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    # A thread takes as many columns of a narrow dtype as it would of float32.
    offs_n = tl.max_contiguous(tl.arange(0, BLOCK)[None, :], [1, 4])
    mask = (offs_m < M) & (offs_n < N)
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n, mask, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, axis=1, keep_dims=True) / count  # of [ROWS, BLOCK]: [ROWS, 1]
    y = x * tl.rsqrt(mean + eps)
    weight = tl.load(weight_ptr + offs_n, offs_n < N, other=0.0).to(tl.float32)
    if WEIGHTING == 0:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    elif WEIGHTING == 2:
        weight = 1.0 + weight
    tl.store(y_ptr + offs_m * N + offs_n, (y * weight).to(y_ptr.dtype.element_ty), mask)


def composed_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weighting: Weighting
) -> torch.Tensor:
    """x [..., N], weight [N] -> [..., N]; TypeError or ValueError for what it does not take."""
    device.require_float("composed_norm", x, weight)
    n = x.shape[-1]
    if weight.shape != (n,) or weight.dtype != x.dtype or n > CHUNK:
        raise ValueError(f"rows of {n} {x.dtype}, and a weight {tuple(weight.shape)}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        rows, tile = device.aligned_rows(x), row_tile(n)
        _composed_norm_kernel[(triton.cdiv(len(rows), tile.rows),)](
            rows, device.aligned_rows(weight), y, len(rows), n, rows.stride(0), float(n), eps,
            WEIGHTING=int(weighting), ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
            enable_fp_fusion=False, **pdl(y.device),
        )  # fmt: skip
    return y
