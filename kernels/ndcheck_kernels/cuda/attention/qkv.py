"""From one product to attention's operands: split, QK norm, rotary, and the write to the cache.

Computes: each head of q and k, RMS-normalised over the head where there are weights for it, then
    rotated: [x1 cos - x2 sin, x2 cos + x1 sin] of its halves x1 and x2; heads of v as they are.
    fp32 throughout, one rounding at the end.
Reduction order: the sum of squares of a head is one `tl.sum` over its row of a tile of
    gcd(MOST_HEADS, heads, kv_heads) heads.
Depends on: head_dim, the numbers of heads, dtype, architecture, Triton version.
Dtypes: bfloat16, float16, float32; cos, sin and the weights may have another of them; the cache
    also float8_e4m3fn: what is rounded to x's dtype is then bounded by 448 and rounded again.
Not claimed: gradients; interleaved or partial rotary; the bits of the unfused form, which rounds
    after every step.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import follow, pdl

HEAD_DIMS = (16, 32, 64, 128, 256)
MOST_HEADS = 2
"""Of 1, 2, 4 and 8, the fastest over one token to 256 on an H200, in decoding an 8B shape."""


@triton.jit(do_not_specialize=["LENGTH", "stride_cb", "stride_cl", "stride_kb", "stride_kh"])
def _qkv_kernel(
    x_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_ptr, k_ptr, v_ptr, offset_ptr, eps,
    LENGTH, stride_x, stride_cb, stride_cl, stride_kb, stride_kh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    HAS_NORM: tl.constexpr, NARROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TILE heads of one token, all of them of q, of k, or of v."""
    follow(PDL)
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    batch, position = token // LENGTH, token % LENGTH
    head = first + tl.arange(0, TILE)[:, None]
    offs = tl.arange(0, D)[None, :]
    x_ptr += token * stride_x + head * D
    x = tl.load(x_ptr + offs).to(tl.float32)  # [TILE, D]
    offset = tl.load(offset_ptr)  # As the weights below: not where it would be waited for.
    if first < HEADS + KV_HEADS:
        other = tl.load(x_ptr + (offs ^ (D // 2))).to(tl.float32)
        if HAS_NORM:
            weight_ptr = q_weight_ptr if first < HEADS else k_weight_ptr
            weight = tl.load(weight_ptr + offs)
            other_weight = tl.load(weight_ptr + (offs ^ (D // 2)))
            factor = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
            x *= factor * weight.to(tl.float32)
            other *= factor * other_weight.to(tl.float32)
        angle = batch * stride_cb + position * stride_cl + offs
        cos = tl.load(cos_ptr + angle).to(tl.float32)
        sin = tl.load(sin_ptr + angle).to(tl.float32)
        x = x * cos + tl.where(offs < D // 2, -other, other) * sin
    y = x.to(q_ptr.dtype.element_ty)
    if first < HEADS:
        tl.store(q_ptr + (token * HEADS + head) * D + offs, y)
    else:
        column = offset + position
        kv_head = (head - HEADS) % KV_HEADS
        place = batch * stride_kb + kv_head * stride_kh + column * D + offs
        # One store: of two, Triton up to 3.8 moves the layout of one into the other's branch.
        cache_ptr = k_ptr if first < HEADS + KV_HEADS else v_ptr
        if NARROW:
            bounded = tl.clamp(y.to(tl.float32), -448.0, 448.0, tl.PropagateNan.ALL)
            tl.store(cache_ptr + place, bounded.to(k_ptr.dtype.element_ty))
        else:
            tl.store(cache_ptr + place, y)


def qkv(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, offset: torch.Tensor, *,
    q_weight: torch.Tensor | None = None, k_weight: torch.Tensor | None = None, eps: float = 1e-6,
) -> torch.Tensor:  # fmt: skip
    """q [B, H, L, D] of x [B, L, (H + 2 H_kv) D]; k and v go to columns offset, offset + 1, ...

    cos, sin [B or 1, L, D]; keys, values [B, H_kv, columns, D], contiguous; offset an int64 scalar
    on the device.
    """
    is_narrow = keys.dtype == values.dtype == torch.float8_e4m3fn
    device.require_float("qkv", x, cos, sin, q_weight, k_weight)
    device.require_float("qkv", *(() if is_narrow else (keys, values)))
    (batch, length, width), (kv_heads, _, dim) = x.shape, keys.shape[1:]
    heads = width // dim - 2 * kv_heads
    if dim not in HEAD_DIMS or cos.shape[-1] != dim or sin.shape != cos.shape or heads <= 0:
        raise ValueError(f"qkv of {tuple(x.shape)} with heads of {dim} and angles of {cos.shape}")
    if not (keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape):
        raise ValueError("qkv writes to contiguous caches of one shape")
    q = torch.empty((batch, length, heads, dim), dtype=x.dtype, device=x.device)
    rows = device.aligned_rows(x)
    cos, sin = (t.expand(batch, length, dim).contiguous() for t in (cos, sin))
    if q.numel():
        tile = math.gcd(MOST_HEADS, heads, kv_heads)
        _qkv_kernel[(batch * length, (heads + 2 * kv_heads) // tile)](
            rows, cos, sin, rows if q_weight is None else q_weight,
            rows if k_weight is None else k_weight, q, keys, values, offset, eps, length,
            rows.stride(0), cos.stride(0), cos.stride(1), keys.stride(0), keys.stride(1),
            HEADS=heads, KV_HEADS=kv_heads, D=dim, TILE=tile,
            HAS_NORM=q_weight is not None, NARROW=is_narrow, num_warps=min(4, tile),
            enable_fp_fusion=True, **pdl(x.device),
        )  # fmt: skip
    return q.transpose(1, 2)
