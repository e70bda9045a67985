"""Parts of a row's result on Hopper: left in device memory, and merged in ascending order."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def merge(tot_m, tot_den, tot, m, den, acc, AXIS: gl.constexpr):
    """A part behind what is merged so far, as in `attention`; queries lie along 1 - AXIS."""
    new_m = gl.maximum(tot_m, m)
    safe_m = gl.where(new_m == float("-inf"), 0.0, new_m)
    fade, split_fade = gl.exp2(tot_m - safe_m), gl.exp2(m - safe_m)
    new_den = gl.fma(tot_den, fade, den * split_fade)
    fades = gl.full_like(tot, 0.0) + gl.expand_dims(fade, AXIS)
    return new_m, new_den, gl.fma(tot, fades, acc * gl.expand_dims(split_fade, AXIS))


@gluon.constexpr_function
def stored_layout(D):
    """Of sums [Q, D] in device memory, as four warps read and write them."""
    return gl.BlockedLayout([1, 4], [128 // D, D // 4], [4, 1], [1, 0])


@gluon.jit
def merge_parts(
    m_ptr, den_ptr, acc_ptr, o_ptr, first, parts, kept, q_length, stride_oh, stride_om,
    KEPT: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The result of a row's key head: what its first chunk has merged, then parts in order."""
    layout: gl.constexpr = stored_layout(D)
    rows = gl.arange(0, KEPT, gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, gl.SliceLayout(0, layout))
    is_kept = rows < kept
    # Other programs wrote all this, so the first-level cache is passed by.
    tot_m = gl.load(m_ptr + rows, is_kept, other=0.0, cache_modifier=".cg")
    tot_den = gl.load(den_ptr + rows, is_kept, other=0.0, cache_modifier=".cg")
    acc_ptrs = acc_ptr + rows[:, None] * D + columns[None, :]
    tot = gl.load(acc_ptrs, is_kept[:, None], other=0.0, cache_modifier=".cg")
    for group in range(first, parts, 64 // KEPT):
        # As many at a time as registers hold: a load takes longer than what is done with it.
        for nth in gl.static_range(64 // KEPT):
            is_there = group + nth < parts
            is_read = is_kept & is_there
            offs = (group + nth) * kept + rows
            m = gl.load(m_ptr + offs, is_read, other=0.0, cache_modifier=".cg")
            den = gl.load(den_ptr + offs, is_read, other=0.0, cache_modifier=".cg")
            acc_ptrs = acc_ptr + offs[:, None] * D + columns[None, :]
            acc = gl.load(acc_ptrs, is_read[:, None], other=0.0, cache_modifier=".cg")
            new_m, new_den, new = merge(tot_m, tot_den, tot, m, den, acc, 1)
            tot_m = gl.where(is_there, new_m, tot_m)
            tot_den = gl.where(is_there, new_den, tot_den)
            tot = gl.where(is_there, new, tot)
    o = tot / gl.where(tot_den == 0.0, 1.0, tot_den)[:, None]
    o_ptrs = (
        o_ptr + (rows // q_length)[:, None] * stride_oh + (rows % q_length)[:, None] * stride_om
    )
    gl.store(o_ptrs + columns[None, :], o.to(o_ptr.dtype.element_ty), is_kept[:, None])


@gluon.jit
def store_part(
    m_ptr, den_ptr, acc_ptr, part, kept, m, den, acc, m_layout: gl.constexpr, layout: gl.constexpr
):
    """Of acc [D, Q]; `m_layout` is that of m and den, and `layout` one to store [Q, D] in."""
    D: gl.constexpr = acc.shape[0]
    offs = part * kept + gl.arange(0, acc.shape[1], m_layout)
    gl.store(m_ptr + offs, m, offs < (part + 1) * kept)
    gl.store(den_ptr + offs, den, offs < (part + 1) * kept)
    offs = part * kept + gl.arange(0, acc.shape[1], gl.SliceLayout(1, layout))
    acc_ptrs = acc_ptr + offs[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    acc = gl.convert_layout(acc.permute((1, 0)), layout)
    gl.store(acc_ptrs, acc, (offs < (part + 1) * kept)[:, None])
