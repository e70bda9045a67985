"""Blocks of keys and values, as the attention kernels scheduled for Hopper copy and weigh them."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def _scaled_up(top, scale):
    """top * scale, rounded up, as in `attention`."""
    m = top * scale
    bits = m.to(gl.int32, bitcast=True)
    above = (bits + gl.where(m < 0.0, -1, 1)).to(gl.float32, bitcast=True)
    return gl.where(gl.fma(top, gl.full_like(top, 0.0) + scale, -m) > 0.0, above, m)


@gluon.jit
def softmax(
    scores, first, positions, m, den, scale, MASKED: gl.constexpr, AXIS: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """One block of scores: probabilities, and what its softmax makes of m and den [Q].

    Keys lie along AXIS, queries along the other.
    """
    if MASKED:
        columns = first + gl.arange(0, scores.shape[AXIS], gl.SliceLayout(1 - AXIS, layout))
        is_seen = gl.expand_dims(columns, 1 - AXIS) <= gl.expand_dims(positions, AXIS)
        scores = gl.where(is_seen, scores, float("-inf"))
    new_m = gl.maximum(m, _scaled_up(gl.max(scores, axis=AXIS), scale))
    safe_m = gl.where(new_m == float("-inf"), 0.0, new_m)
    zeros = gl.full_like(scores, 0.0)
    p = gl.exp2(gl.fma(scores, zeros + scale, zeros - gl.expand_dims(safe_m, AXIS)))
    # As in `attention`: 1 + p counts p in units of 2**-23, and integers add in any order.
    ones: gl.constexpr = 0x3F800000 * scores.shape[AXIS] % 2**32
    units = gl.sum((p + 1.0).to(gl.uint32, bitcast=True), axis=AXIS) - ones
    fade = gl.exp2(m - safe_m)
    units = units.to(gl.int32, bitcast=True).to(gl.float32) * 1.1920928955078125e-07  # 2**-23
    return p, new_m, gl.fma(den, fade, units), fade


@gluon.jit
def forget_unused(v, first, end, layout: gl.constexpr):
    """Zero the values behind the row's end: what lies there may be NaN, which no weight hides."""
    values = v.load(layout)
    columns = first + gl.arange(0, values.shape[0], gl.SliceLayout(1, layout))
    v.store(gl.where((columns < end)[:, None], values, gl.full_like(values, 0.0)))
    fence_async_shared()


def shared_layout(block: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of such a block of bfloat16 or float16, as the tensor cores read it."""
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(block, element)


def descriptor(t: torch.Tensor, rows: int) -> TensorDescriptor:
    """Of blocks [rows, D] of one head of a [B, H, T, D] tensor."""
    block = [1, 1, rows, t.shape[3]]
    layout = shared_layout(block, t.dtype)
    # The stride of an axis of length 1 is never used, and may be anything.
    strides = [s if n > 1 else t.shape[3] for s, n in zip(t.stride(), t.shape, strict=True)]
    return TensorDescriptor(t, list(t.shape), [*strides[:3], 1], block, layout)
