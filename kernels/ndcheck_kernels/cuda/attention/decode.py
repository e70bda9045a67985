"""Few queries: a row's splits in parallel, then their merge (`causal` has the contract)."""

from __future__ import annotations

import triton
import triton.language as tl

from ndcheck_kernels.cuda.attention.splits import (
    attend_range,
    first_seen,
    first_seen_split,
    merge,
    row_bounds,
    split_count,
    split_start,
    start_total,
)
from ndcheck_kernels.cuda.dependent_launch import follow
from ndcheck_kernels.cuda.rows.quantise import quantise_blocks


@triton.jit
def _store(o, o_ptrs, scale_ptrs, mask_q, mask_v, CODES_OF: tl.constexpr):
    """o [Q, DV], or if CODES_OF is a dtype its codes after it was rounded to that, and scales."""
    if CODES_OF is not None:
        o, scale = quantise_blocks(o.to(CODES_OF).to(tl.float32))
        tl.store(scale_ptrs, scale, mask_q)
    tl.store(o_ptrs, o.to(o_ptrs.dtype.element_ty), mask_q & mask_v)


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, m_ptr, den_ptr, acc_ptr, o_ptr, o_scale_ptr, starts_ptr, lengths_ptr,
    sinks_ptr, slopes_ptr, scale, cap, window, q_length, kv_length, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    WHOLE: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_SINKS: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr,
    BIAS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    DIM_V: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, BLOCK_KV: tl.constexpr,
    SPLIT: tl.constexpr, SHORT: tl.constexpr, CODES_OF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Splits in parallel: one program per split, with all queries of one key head in its rows.

    WHOLE where the cache has room for one split only: it is merged with the sink here, and without
    one merging would change no bit.
    """
    follow(PDL)
    place, kv_head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    start, end = row_bounds(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
    split = place + first_seen_split(start, end, q_length, window, SPLIT, SHORT, WINDOWED, CHUNKED)
    first = start + split_start(split, SPLIT, SHORT)
    last = tl.minimum(start + split_start(split + 1, SPLIT, SHORT), end)
    if (first < end) | WHOLE:
        if WINDOWED:
            hidden = tl.maximum(first_seen(end - q_length, start, window, CHUNKED) - first, 0)
            first += hidden // BLOCK_KV * BLOCK_KV
        rows = tl.arange(0, ROWS)
        offs_d = tl.arange(0, D)
        offs_v = tl.arange(0, DV)
        mask_q = rows < GROUP * q_length
        positions = end - q_length + rows % q_length
        head = kv_head * GROUP + rows // q_length
        q_ptrs = q_ptr + batch * stride_qb + head[:, None] * stride_qh
        q_ptrs += (rows % q_length)[:, None] * stride_qm + offs_d[None, :]
        q = tl.load(q_ptrs, mask_q[:, None] & (offs_d < DIM)[None, :], other=0.0)  # [ROWS, D]
        k_ptr += batch * stride_kb + kv_head * stride_kh
        v_ptr += batch * stride_vb + kv_head * stride_vh
        slopes = tl.zeros((ROWS,), dtype=tl.float32)
        if BIAS is not None:
            slopes = tl.load(slopes_ptr + head, mask_q, other=0.0)
        m, den, acc = attend_range(
            q, k_ptr, v_ptr, slopes, first, last, start, end, positions,
            tl.full((ROWS,), float("-inf"), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32),
            tl.zeros((ROWS, DV), dtype=tl.float32), scale, cap, window, stride_kn, stride_vn,
            BLOCK_KV, DIM, D, DIM_V, DV, True, CAPPED, WINDOWED, CHUNKED, BIAS,
        )  # fmt: skip
        if WHOLE:
            if HAS_SINKS:
                sink_m, sink_den = start_total(sinks_ptr, tl.where(mask_q, head, 0), ROWS, True)
                m, den, acc = merge(sink_m, sink_den, tl.zeros_like(acc), m, den, acc)
            o = acc / tl.where(den == 0.0, 1.0, den)[:, None]
            o_ptrs = o_ptr + batch * stride_ob + head[:, None] * stride_oh
            o_ptrs += (rows % q_length)[:, None] * stride_om + offs_v[None, :]
            o_row = head * tl.num_programs(2) * q_length + batch * q_length + rows % q_length
            _store(
                o, o_ptrs, o_scale_ptr + o_row[:, None], mask_q[:, None],
                (offs_v < DIM_V)[None, :], CODES_OF,
            )  # fmt: skip
        else:
            part = (batch * tl.num_programs(1) + kv_head) * tl.num_programs(0) + place
            offs = part * GROUP * q_length + rows
            tl.store(m_ptr + offs, m, mask_q)
            tl.store(den_ptr + offs, den, mask_q)
            tl.store(acc_ptr + offs[:, None] * DV + offs_v[None, :], acc, mask_q[:, None])


@triton.jit
def _merge_kernel(
    m_ptr, den_ptr, acc_ptr, o_ptr, o_scale_ptr, starts_ptr, lengths_ptr, sinks_ptr, window,
    q_length, kv_length, splits, stride_ob, stride_oh, stride_om,
    HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SINKS: tl.constexpr,
    WINDOWED: tl.constexpr, CHUNKED: tl.constexpr, GROUP: tl.constexpr, DIM_V: tl.constexpr,
    DV: tl.constexpr, SPLIT: tl.constexpr, SHORT: tl.constexpr, CODES_OF: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The splits that `_decode_kernel` left, merged for one query of one head."""
    follow(PDL)
    row, kv_head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    head = kv_head * GROUP + row // q_length
    start, end = row_bounds(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
    one = tl.arange(0, 1)
    offs_v = tl.arange(0, DV)[None, :]
    tot_m, tot_den = start_total(sinks_ptr, head, 1, HAS_SINKS)
    tot = tl.zeros((1, DV), dtype=tl.float32)
    part = (batch * tl.num_programs(1) + kv_head) * splits * GROUP * q_length + row
    first = first_seen_split(start, end, q_length, window, SPLIT, SHORT, WINDOWED, CHUNKED)
    count = split_count(end - start, SPLIT, SHORT) - first
    for place in tl.range(count, loop_unroll_factor=8):
        offs = part + place * GROUP * q_length + one
        m, den = tl.load(m_ptr + offs), tl.load(den_ptr + offs)
        acc = tl.load(acc_ptr + offs[:, None] * DV + offs_v)
        tot_m, tot_den, tot = merge(tot_m, tot_den, tot, m, den, acc)
    o = tot / tl.where(tot_den == 0.0, 1.0, tot_den)[:, None]
    o_ptr += batch * stride_ob + head * stride_oh
    o_ptrs = o_ptr + (row % q_length) * stride_om + one[:, None] + offs_v
    o_row = head * tl.num_programs(2) * q_length + batch * q_length + row % q_length
    mask_q = one[:, None] == 0
    _store(o, o_ptrs, o_scale_ptr + o_row + one[:, None], mask_q, offs_v < DIM_V, CODES_OF)
