"""Many queries: the splits of a row in sequence, in one program (`causal` has the contract)."""

from __future__ import annotations

import triton
import triton.language as tl

from ndcheck_kernels.cuda.attention.splits import (
    attend_range,
    first_seen,
    merge,
    row_bounds,
    split_count,
    split_of,
    split_start,
    start_total,
)
from ndcheck_kernels.cuda.dependent_launch import follow


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, starts_ptr, lengths_ptr, sinks_ptr, slopes_ptr, scale, cap, window,
    q_length, kv_length, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SINKS: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr, BIAS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr,
    DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, SPLIT: tl.constexpr,
    SHORT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Splits in sequence: one program per block of queries of one head."""
    follow(PDL)
    head = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    # The last queries see most keys, so they start first.
    offs_q = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, D)
    offs_v = tl.arange(0, DV)
    start, end = row_bounds(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
    positions = end - q_length + offs_q
    mask_q = offs_q < q_length
    q_ptrs = q_ptr + batch * stride_qb + head * stride_qh
    q_ptrs += offs_q.to(tl.int64)[:, None] * stride_qm + offs_d[None, :]
    q = tl.load(q_ptrs, mask_q[:, None] & (offs_d < DIM)[None, :], other=0.0)  # [BLOCK_Q, D]
    k_ptr += batch * stride_kb + (head // GROUP) * stride_kh
    v_ptr += batch * stride_vb + (head // GROUP) * stride_vh
    slopes = tl.zeros((1,), dtype=tl.float32)  # One for all queries, whose bias is then one row.
    if BIAS is not None:
        slopes += tl.load(slopes_ptr + head)
    tot_m, tot_den = start_total(sinks_ptr, head, BLOCK_Q, HAS_SINKS)
    tot = tl.zeros((BLOCK_Q, DV), dtype=tl.float32)
    stop = tl.minimum(end, tl.max(positions, axis=0) + 1)
    seen_by_all = tl.minimum(tl.min(positions, axis=0) + 1, stop)
    seen = start  # by any query here
    if WINDOWED:
        seen = tl.maximum(start, first_seen(tl.min(positions, axis=0), start, window, CHUNKED))
        seen_by_all = start  # window's edge: every block is masked
    first_split = split_of(seen - start, SPLIT, SHORT) if WINDOWED else 0
    for split in range(first_split, split_count(stop - start, SPLIT, SHORT)):
        first = start + split_start(split, SPLIT, SHORT)
        last = tl.minimum(start + split_start(split + 1, SPLIT, SHORT), stop)
        if WINDOWED:
            first += tl.maximum(seen - first, 0) // BLOCK_KV * BLOCK_KV
        clear = tl.minimum(tl.maximum(seen_by_all, first), last) - first
        clear = first + clear // BLOCK_KV * BLOCK_KV
        m = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
        den = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_Q, DV), dtype=tl.float32)
        m, den, acc = attend_range(
            q, k_ptr, v_ptr, slopes, first, clear, start, end, positions, m, den, acc, scale, cap,
            window, stride_kn, stride_vn, BLOCK_KV, DIM, D, DIM_V, DV, False, CAPPED, False, False,
            BIAS,
        )  # fmt: skip
        m, den, acc = attend_range(
            q, k_ptr, v_ptr, slopes, clear, last, start, end, positions, m, den, acc, scale, cap,
            window, stride_kn, stride_vn, BLOCK_KV, DIM, D, DIM_V, DV, True, CAPPED, WINDOWED,
            CHUNKED, BIAS,
        )  # fmt: skip
        tot_m, tot_den, tot = merge(tot_m, tot_den, tot, m, den, acc)
    o = tot / tl.where(tot_den == 0.0, 1.0, tot_den)[:, None]
    o_ptrs = o_ptr + batch * stride_ob + head * stride_oh
    o_ptrs += offs_q.to(tl.int64)[:, None] * stride_om + offs_v[None, :]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask_q[:, None] & (offs_v < DIM_V)[None, :])
