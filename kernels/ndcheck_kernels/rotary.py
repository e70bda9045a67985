# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: ANN001, ANN202
# (both: Triton types the arguments of jit functions)
"""Rotary position embedding of one tensor, the two halves of a head rotated against each other.

Computes: with x = [x1, x2] along the head: [x1 cos - x2 sin, x2 cos + x1 sin] in fp32, one
    rounding at the end.
Reduction order: none; every element depends on its own pair and angle.
Depends on: dtype, architecture, Triton version.
Dtypes: bfloat16, float16, float32; cos and sin may have another of them.
Not claimed: gradients; interleaved rotary; the bits of the unfused form, which rounds each product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import follow, pdl


@triton.jit
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, HEADS, LENGTH, HALF,
    stride_xb, stride_xh, stride_xl, stride_cb, stride_cl, stride_sb, stride_sl,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)  # of [B, HEADS, LENGTH]
    position = row % LENGTH
    head = (row // LENGTH) % HEADS
    batch = row // (LENGTH * HEADS)
    offs = tl.arange(0, BLOCK)
    mask = offs < HALF
    x_ptr += batch * stride_xb + head * stride_xh + position * stride_xl
    y_ptr += row * 2 * HALF
    cos_ptr += batch * stride_cb + position * stride_cl
    sin_ptr += batch * stride_sb + position * stride_sl
    x1 = tl.load(x_ptr + offs, mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + HALF + offs, mask, other=0.0).to(tl.float32)
    for half in tl.static_range(2):
        cos = tl.load(cos_ptr + half * HALF + offs, mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + half * HALF + offs, mask, other=0.0).to(tl.float32)
        y = x1 * cos - x2 * sin if half == 0 else x2 * cos + x1 * sin
        tl.store(y_ptr + half * HALF + offs, y.to(y_ptr.dtype.element_ty), mask)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x is [B, H, L, D], cos and sin are [B or 1, L, D]."""
    device.require_float("rotary", x, cos, sin)
    batch, heads, length, dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        x = x if x.stride(3) == 1 else x.contiguous()
        cos, sin = (t.expand(batch, length, dim) for t in (cos, sin))
        cos, sin = (t if t.stride(2) == 1 else t.contiguous() for t in (cos, sin))
        _rotary_kernel[(batch * heads * length,)](
            x, cos, sin, y, heads, length, dim // 2, *x.stride()[:3], *cos.stride()[:2],
            *sin.stride()[:2], BLOCK=triton.next_power_of_2(dim // 2), num_warps=1,
            enable_fp_fusion=True, **pdl(y.device),
        )  # fmt: skip
    return y
