"""Few queries: a row's splits in parallel, then their merge (`causal` has the contract)."""

from __future__ import annotations

import triton
import triton.language as tl

from ndcheck_kernels.cuda.attention.splits import (
    attend_block,
    first_seen,
    first_seen_split,
    merge,
    opens_split,
    row_bounds,
    split_count,
    split_start,
    start_total,
)
from ndcheck_kernels.cuda.dependent_launch import follow
from ndcheck_kernels.cuda.rows.quantise import quantise_blocks


@triton.jit
def _store_part(
    m_ptr, den_ptr, acc_ptr, part, m, den, acc, kept, ROWS: tl.constexpr, DV: tl.constexpr
):
    """Leave a split's part: the first `kept` of its rows."""
    rows = tl.arange(0, ROWS)
    offs = part * kept + rows
    is_kept = rows < kept
    tl.store(m_ptr + offs, m, is_kept)
    tl.store(den_ptr + offs, den, is_kept)
    # In halves, which take half of the shared memory on the way: so one more program fits.
    left, right = acc.reshape(ROWS, 2, DV // 2).permute(0, 2, 1).split()
    acc_ptrs = acc_ptr + offs[:, None] * DV + tl.arange(0, DV // 2)[None, :]
    tl.store(acc_ptrs, left, is_kept[:, None])
    tl.store(acc_ptrs + DV // 2, right, is_kept[:, None])


@triton.jit
def _merge_parts(
    m_ptr, den_ptr, acc_ptr, first_part, parts, kept, sinks_ptr, first_head, q_length,
    HAS_SINKS: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """All parts of a row's key head, in ascending order: maxima, denominators and sums."""
    rows = tl.arange(0, ROWS)
    is_kept = rows < kept
    head = first_head + tl.where(is_kept, rows // q_length, 0)
    tot_m, tot_den = start_total(sinks_ptr, head, ROWS, HAS_SINKS)
    tot = tl.zeros((ROWS, DV), dtype=tl.float32)
    # Other programs wrote them, so the first-level cache is passed by. As many at a time as
    # registers hold: a load takes longer than what is done with it.
    for place in tl.range(parts, loop_unroll_factor=max(1, 32 // ROWS)):
        offs = (first_part + place) * kept + rows
        m = tl.load(m_ptr + offs, is_kept, other=0.0, cache_modifier=".cg")
        den = tl.load(den_ptr + offs, is_kept, other=0.0, cache_modifier=".cg")
        acc_ptrs = acc_ptr + offs[:, None] * DV + tl.arange(0, DV)[None, :]
        acc = tl.load(acc_ptrs, is_kept[:, None], other=0.0, cache_modifier=".cg")
        tot_m, tot_den, tot = merge(tot_m, tot_den, tot, m, den, acc)
    return tot_den, tot


@triton.jit
def _store_result(
    o_ptr, o_scale_ptr, den, acc, kept, first_head, q_length, stride_oh, stride_om, stride_sh,
    ROWS: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr, CODES_OF: tl.constexpr,
):  # fmt: skip
    """The result, or if CODES_OF is a dtype its codes after it was rounded to that, and scales."""
    rows = tl.arange(0, ROWS)
    offs_v = tl.arange(0, DV)
    head, query = first_head + rows // q_length, rows % q_length
    is_kept = (rows < kept)[:, None]
    o = acc / tl.where(den == 0.0, 1.0, den)[:, None]
    if CODES_OF is not None:
        o, scale = quantise_blocks(o.to(CODES_OF).to(tl.float32))
        tl.store(o_scale_ptr + (head * stride_sh + query)[:, None], scale, is_kept)
    o_ptrs = o_ptr + head[:, None] * stride_oh + query[:, None] * stride_om + offs_v[None, :]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), is_kept & (offs_v < DIM_V))


# Lengths and counts differ from load to load, and neither their divisors nor the alignment of what
# is read by the number help any load or store.
@triton.jit(
    do_not_specialize=["kv_length"],
    do_not_specialize_on_alignment=[
        "starts_ptr", "lengths_ptr", "sinks_ptr", "slopes_ptr", "window", "q_length", "splits",
        "run",
    ],
)  # fmt: skip
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, m_ptr, den_ptr, acc_ptr, counter_ptr, o_ptr, o_scale_ptr, starts_ptr,
    lengths_ptr, sinks_ptr, slopes_ptr, scale, cap, window, q_length, kv_length, splits, run,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    WHOLE: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_SINKS: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr,
    BIAS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    DIM_V: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_KV: tl.constexpr, SPLIT: tl.constexpr, SHORT: tl.constexpr, CODES_OF: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Splits in parallel: `run` of them per program, with all queries of one key head in its rows.

    WHOLE where one program has all the splits that there may be, and merges each when it ends.
    Else all are left in parts, at most `splits` of them, and the program that comes last merges
    them. KEPT is then the power of two that holds the rows in use.
    """
    follow(PDL)
    # The first splits of all rows, which are short and always there, before the second ones.
    kv_head, place = tl.program_id(0), tl.program_id(2)
    batch = tl.program_id(1).to(tl.int64)
    start, end = row_bounds(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
    seen_split = first_seen_split(start, end, q_length, window, SPLIT, SHORT, WINDOWED, CHUNKED)
    # A row without tokens has a result too.
    parts = tl.maximum(split_count(end - start, SPLIT, SHORT) - seen_split, 1)
    runs = tl.cdiv(parts, run)
    if place < runs:
        split = seen_split + place * run
        first = start + split_start(split, SPLIT, SHORT)
        last = tl.minimum(start + split_start(split + run, SPLIT, SHORT), end)
        if WINDOWED:
            hidden = tl.maximum(first_seen(end - q_length, start, window, CHUNKED) - first, 0)
            first += hidden // BLOCK_KV * BLOCK_KV
        kept = GROUP * q_length
        rows = tl.arange(0, ROWS)
        offs_d = tl.arange(0, D)
        mask_q = rows < kept
        positions = end - q_length + rows % q_length
        first_head = kv_head * GROUP
        head = first_head + rows // q_length
        q_ptrs = q_ptr + batch * stride_qb + head[:, None] * stride_qh
        q_ptrs += (rows % q_length)[:, None] * stride_qm + offs_d[None, :]
        q = tl.load(q_ptrs, mask_q[:, None] & (offs_d < DIM)[None, :], other=0.0)  # [ROWS, D]
        k_ptr += batch * stride_kb + kv_head * stride_kh
        v_ptr += batch * stride_vb + kv_head * stride_vh
        o_ptr += batch * stride_ob
        o_scale_ptr += batch * q_length
        stride_sh = tl.num_programs(1) * q_length
        slopes = tl.zeros((ROWS,), dtype=tl.float32)
        if BIAS is not None:
            slopes = tl.load(slopes_ptr + head, mask_q, other=0.0)
        tot_m, tot_den = start_total(
            sinks_ptr, tl.where(mask_q, head, 0), ROWS, HAS_SINKS and WHOLE
        )
        tot = tl.zeros((ROWS, DV), dtype=tl.float32)
        pair = batch * tl.num_programs(0) + kv_head
        first_part = pair * splits
        part = first_part + place * run
        m = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        den = tl.zeros((ROWS,), dtype=tl.float32)
        acc = tl.zeros((ROWS, DV), dtype=tl.float32)
        # One loop over all splits of the run, so that loads run ahead across their ends.
        for n in range(first, last, BLOCK_KV):
            if (n > first) & opens_split(n - start, SPLIT, SHORT):
                if WHOLE:
                    tot_m, tot_den, tot = merge(tot_m, tot_den, tot, m, den, acc)
                else:
                    _store_part(m_ptr, den_ptr, acc_ptr, part, m, den, acc, kept, ROWS, DV)
                    part += 1
                m = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
                den = tl.zeros((ROWS,), dtype=tl.float32)
                acc = tl.zeros((ROWS, DV), dtype=tl.float32)
            m, den, acc = attend_block(
                q, k_ptr, v_ptr, slopes, n, start, end, positions, m, den, acc, scale, cap, window,
                stride_kn, stride_vn, BLOCK_KV, DIM, D, DIM_V, DV, True, CAPPED, WINDOWED, CHUNKED,
                BIAS,
            )  # fmt: skip
        if WHOLE:
            tot_m, tot_den, tot = merge(tot_m, tot_den, tot, m, den, acc)
            _store_result(
                o_ptr, o_scale_ptr, tot_den, tot, kept, first_head, q_length, stride_oh, stride_om,
                stride_sh, ROWS, DIM_V, DV, CODES_OF,
            )  # fmt: skip
        else:
            _store_part(m_ptr, den_ptr, acc_ptr, part, m, den, acc, kept, ROWS, DV)
            tl.debug_barrier()
            if tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel") == runs - 1:
                tl.store(counter_ptr + pair, 0)
                all_den, all_acc = _merge_parts(
                    m_ptr, den_ptr, acc_ptr, first_part, parts, kept, sinks_ptr, first_head,
                    q_length, HAS_SINKS, KEPT, DV,
                )  # fmt: skip
                _store_result(
                    o_ptr, o_scale_ptr, all_den, all_acc, kept, first_head, q_length, stride_oh,
                    stride_om, stride_sh, KEPT, DIM_V, DV, CODES_OF,
                )  # fmt: skip
