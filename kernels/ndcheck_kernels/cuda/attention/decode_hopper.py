"""Few queries of many rows, scheduled for Hopper by hand: the bits of `decode`, sooner.

Computes: as `attention`, without a window or a cap on the scores.
Reduction order: that of `attention`: every product, maximum and sum below stands there too, in the
    same order.
Schedule: the splits of a row are cut into runs, and two programs per SM walk over all runs of all
    rows. In each one warp copies blocks of keys and values to shared memory (TMA), and four
    warps attend to them. Their products are the transposed ones, keys by queries and columns of
    values by queries: a tensor core takes 64 rows at a time, and of queries there are few. A row's
    first run is merged as it goes, since merging starts there; of later ones each split is left
    in a part, and the program that leaves a row's last one merges them. So where there are more
    rows than programs nothing is left at all.
Dtypes: bfloat16, float16; head_dim 64 or 128.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.attention.hopper_blocks import (
    descriptor,
    forget_unused,
    shared_layout,
    softmax,
)
from ndcheck_kernels.cuda.attention.hopper_merging import (
    merge,
    merge_parts,
    store_part,
    stored_layout,
)
from ndcheck_kernels.cuda.attention.splits import LOG2_E, row_bounds, split_count, split_start
from ndcheck_kernels.cuda.configs import AttentionConfig
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.cuda.gluon_names import async_load, thread_barrier

_STAGED = 2 << 14
"""Numbers of keys and values that have a place in shared memory."""


@gluon.jit
def _run_at(
    item, pairs, kv_heads, runs, starts_ptr, lengths_ptr, kv_length, HAS_STARTS: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, SPLIT: gl.constexpr, SHORT: gl.constexpr,
):  # fmt: skip
    """Its row's own tokens, its own splits, and how many splits the row's first run has."""
    batch = item % pairs // kv_heads
    start, end = row_bounds(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
    tokens = end - start
    nth = item // pairs
    low = split_count(tokens * nth // runs, SPLIT, SHORT)
    high = split_count(tokens * (nth + 1) // runs, SPLIT, SHORT)
    return start, end, low, high, split_count(tokens // runs, SPLIT, SHORT)


@gluon.jit
def _load(
    k_desc, v_desc, smem, full, empty, starts_ptr, lengths_ptr, pairs, kv_heads, items, runs,
    kv_length, HAS_STARTS: gl.constexpr, HAS_LENGTHS: gl.constexpr, BLOCK_KV: gl.constexpr,
    SPLIT: gl.constexpr, SHORT: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The warp that copies: keys and values of each run, block by block, in turns."""
    copied = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        start, end, low, high, _ = _run_at(
            item, pairs, kv_heads, runs, starts_ptr, lengths_ptr, kv_length, HAS_STARTS,
            HAS_LENGTHS, SPLIT, SHORT,
        )  # fmt: skip
        first = start + split_start(low, SPLIT, SHORT)
        last = gl.minimum(start + split_start(high, SPLIT, SHORT), end)
        pair = item % pairs
        for n in range(first, last, BLOCK_KV):
            at = [pair // kv_heads, pair % kv_heads, n, 0]
            for of_values in gl.static_range(2):
                slot = copied % SLOTS
                mbarrier.wait(empty.index(slot), ((copied // SLOTS) & 1) ^ 1)
                mbarrier.expect(full.index(slot), k_desc.block_type.nbytes)
                if of_values == 0:
                    async_load(k_desc, at, full.index(slot), smem.index(slot))
                else:
                    async_load(v_desc, at, full.index(slot), smem.index(slot))
                copied += 1


@gluon.jit
def _load_q(q_ptrs, item, pairs, kv_heads, group_stride, stride_qb, is_kept):
    """The queries of a run's key head, and of what follows the last one those of some other."""
    pair = item % pairs
    q_ptrs += (pair // kv_heads).to(gl.int64) * stride_qb + pair % kv_heads * group_stride
    return gl.load(q_ptrs, is_kept, other=0.0)


@gluon.jit
def _attend(
    q_ptr, q_smem, p_smem, smem, full, empty, m_ptr, den_ptr, acc_ptr, counter_ptr, o_ptr,
    sinks_ptr, starts_ptr, lengths_ptr, scale, pairs, kv_heads, items, runs, splits, q_length,
    kv_length, stride_qb, stride_qh, stride_qm, stride_ob, stride_oh, stride_om,
    HAS_STARTS: gl.constexpr, HAS_LENGTHS: gl.constexpr, HAS_SINKS: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_KV: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
    KEPT: gl.constexpr, SPLIT: gl.constexpr, SHORT: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The warps that compute: all queries of a key head over the splits of a run, in order."""
    dtype: gl.constexpr = smem.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(0, layout)
    store_layout: gl.constexpr = stored_layout(D)
    no_scores = gl.zeros([BLOCK_KV, ROWS], gl.float32, layout)
    kept = GROUP * q_length
    rows = gl.arange(0, ROWS, row_layout)
    q_rows = gl.arange(0, ROWS, gl.SliceLayout(1, load_layout))
    q_columns = gl.arange(0, D, gl.SliceLayout(0, load_layout))
    nth_head, nth_query = (q_rows // q_length)[:, None], (q_rows % q_length)[:, None]
    q_ptrs = q_ptr + nth_head * stride_qh + nth_query * stride_qm + q_columns[None, :]
    o_offs = nth_head * stride_oh + nth_query * stride_om + q_columns[None, :]
    is_kept = (q_rows < kept)[:, None]
    group_stride = GROUP * stride_qh
    used = 0
    step = gl.num_programs(0)
    next_q = _load_q(q_ptrs, gl.program_id(0), pairs, kv_heads, group_stride, stride_qb, is_kept)
    for item in range(gl.program_id(0), items, step):
        q = next_q  # Asked for a run ago: while memory is busy, it takes as long as a block.
        next_q = _load_q(q_ptrs, item + step, pairs, kv_heads, group_stride, stride_qb, is_kept)
        start, end, low, high, first = _run_at(
            item, pairs, kv_heads, runs, starts_ptr, lengths_ptr, kv_length, HAS_STARTS,
            HAS_LENGTHS, SPLIT, SHORT,
        )  # fmt: skip
        # A row without tokens has a result too.
        if (low < high) | ((item < pairs) & (end == start)):
            pair = item % pairs
            batch, kv_head = (pair // kv_heads).to(gl.int64), pair % kv_heads
            parts = split_count(end - start, SPLIT, SHORT)
            q_smem.store(q)
            fence_async_shared()
            positions = end - q_length + rows % q_length
            tot_m = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
            tot_den = gl.zeros([ROWS], gl.float32, row_layout)
            tot = gl.zeros([D, ROWS], gl.float32, layout)
            if HAS_SINKS:
                heads = kv_head * GROUP + gl.where(rows < kept, rows // q_length, 0)
                tot_m = gl.load(sinks_ptr + heads).to(gl.float32) * LOG2_E
                tot_den += 1.0
            offs = pair.to(gl.int64) * splits * kept
            m_ptrs, den_ptrs, acc_ptrs = m_ptr + offs, den_ptr + offs, acc_ptr + offs * D
            o_ptrs = o_ptr + batch * stride_ob + kv_head * GROUP * stride_oh
            for split in range(low, high):
                begin = start + split_start(split, SPLIT, SHORT)
                last = gl.minimum(start + split_start(split + 1, SPLIT, SHORT), end)
                m = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
                den = gl.zeros([ROWS], gl.float32, row_layout)
                acc = gl.zeros([D, ROWS], gl.float32, layout)
                # What all queries see comes first.
                clear = gl.minimum(end - q_length + 1, last) - begin
                middle = begin + gl.maximum(clear, 0) // BLOCK_KV * BLOCK_KV
                for masked in gl.static_range(2):
                    for n in range(
                        begin if masked == 0 else middle, middle if masked == 0 else last, BLOCK_KV
                    ):
                        slot = used % SLOTS
                        mbarrier.wait(full.index(slot), (used // SLOTS) & 1)
                        k = smem.index(slot).reshape([BLOCK_KV, D])
                        scores = warpgroup_mma(
                            k, q_smem.permute((1, 0)), no_scores, use_acc=False, is_async=True
                        )
                        scores = warpgroup_mma_wait(0, deps=[scores])
                        mbarrier.arrive(empty.index(slot), count=1)
                        p, m, den, fade = softmax(
                            scores, n, positions, m, den, scale, masked == 1, 0, layout
                        )
                        p_smem.permute((1, 0)).store(p.to(dtype))
                        fence_async_shared()
                        acc = acc * fade[None, :]
                        used += 1
                        slot = used % SLOTS
                        mbarrier.wait(full.index(slot), (used // SLOTS) & 1)
                        v = smem.index(slot).reshape([BLOCK_KV, D])
                        if masked == 1:  # noqa: SIM102 - the jit compiler leaves it out else
                            if n + BLOCK_KV > end:
                                forget_unused(v, n, end, load_layout)
                        acc = warpgroup_mma(
                            v.permute((1, 0)), p_smem.permute((1, 0)), acc, is_async=True
                        )
                        acc = warpgroup_mma_wait(0, deps=[acc])
                        mbarrier.arrive(empty.index(slot), count=1)
                        used += 1
                if low > 0:
                    store_part(
                        m_ptrs, den_ptrs, acc_ptrs, split, kept, m, den, acc, row_layout,
                        store_layout,
                    )  # fmt: skip
                tot_m, tot_den, tot = merge(tot_m, tot_den, tot, m, den, acc, 0)
            if (low == 0) & (high == parts):
                o = tot / gl.where(tot_den == 0.0, 1.0, tot_den)[None, :]
                o = gl.convert_layout(o.to(dtype).permute((1, 0)), load_layout)
                gl.store(o_ptrs + o_offs, o, is_kept)
            else:
                if low == 0:
                    store_part(
                        m_ptrs, den_ptrs, acc_ptrs, 0, kept, tot_m, tot_den, tot, row_layout,
                        store_layout,
                    )  # fmt: skip
                thread_barrier()
                left = gl.atomic_add(counter_ptr + pair, high - low, sem="acq_rel") + high - low
                if left == parts:
                    gl.store(counter_ptr + pair, 0)
                    merge_parts(
                        m_ptrs, den_ptrs, acc_ptrs, o_ptrs, first, parts, kept, q_length, stride_oh,
                        stride_om, KEPT, D,
                    )  # fmt: skip


@gluon.jit(
    do_not_specialize=["pairs", "kv_heads", "items", "runs", "splits", "q_length", "kv_length"],
    do_not_specialize_on_alignment=["sinks_ptr", "starts_ptr", "lengths_ptr"],
)
def _decode_hopper_kernel(
    q_ptr, k_desc, v_desc, m_ptr, den_ptr, acc_ptr, counter_ptr, o_ptr, sinks_ptr, starts_ptr,
    lengths_ptr, scale, pairs, kv_heads, items, runs, splits, q_length, kv_length, stride_qb,
    stride_qh, stride_qm, stride_ob, stride_oh, stride_om, HAS_STARTS: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, HAS_SINKS: gl.constexpr, GROUP: gl.constexpr, BLOCK_KV: gl.constexpr,
    D: gl.constexpr, ROWS: gl.constexpr, KEPT: gl.constexpr, SPLIT: gl.constexpr,
    SHORT: gl.constexpr, QUERIES: gl.constexpr, WEIGHTS: gl.constexpr, SLOTS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(k_desc.dtype, [ROWS, D], QUERIES)
    p_smem = gl.allocate_shared_memory(k_desc.dtype, [ROWS, BLOCK_KV], WEIGHTS)
    smem = gl.allocate_shared_memory(k_desc.dtype, [SLOTS, 1, 1, BLOCK_KV, D], k_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()
    follow(PDL)
    gl.warp_specialize(
        [
            (_attend, (
                q_ptr, q_smem, p_smem, smem, full, empty, m_ptr, den_ptr, acc_ptr, counter_ptr,
                o_ptr, sinks_ptr, starts_ptr, lengths_ptr, scale, pairs, kv_heads, items, runs,
                splits, q_length, kv_length, stride_qb, stride_qh, stride_qm, stride_ob, stride_oh,
                stride_om, HAS_STARTS, HAS_LENGTHS, HAS_SINKS, GROUP, BLOCK_KV, D, ROWS, KEPT,
                SPLIT, SHORT, SLOTS,
            )),
            (_load, (
                k_desc, v_desc, smem, full, empty, starts_ptr, lengths_ptr, pairs, kv_heads, items,
                runs, kv_length, HAS_STARTS, HAS_LENGTHS, BLOCK_KV, SPLIT, SHORT, SLOTS,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _runs_per_row(pairs: int, splits: int, blocks: int, longest: int, sms: int) -> int:
    """Into how many runs to cut the splits of each of `pairs` of rows and key heads.

    As many as make the last multiprocessor end first; a split has at most `longest` blocks. What
    a run costs besides, as long as three blocks where it leaves parts, the other program of its
    multiprocessor hides.
    """

    def blocks_in_time(runs: int) -> float:
        largest = -(-blocks // (runs * longest)) * longest
        besides = 3.0 if runs > 1 else 0.7
        n_runs = pairs * runs
        return -(-n_runs // sms) * largest + -(-n_runs // (2 * sms)) * besides

    return min(range(1, min(splits, 64) + 1), key=lambda runs: (blocks_in_time(runs), -runs))


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], counter: torch.Tensor,
    starts: torch.Tensor | None, lengths: torch.Tensor | None, sinks: torch.Tensor | None,
    scale: float, config: AttentionConfig,
) -> None:  # fmt: skip
    """Write the attention of q [B, H, L, D] over k and v [B, KV heads, T, D] to o [B, H, L, D].

    `parts` are room for maxima and denominators [B, KV heads, splits, rows] and sums [..., D] in
    float32, `counter` zeros [B x KV heads]; the rest is as in `prefill_hopper`.
    """
    batch, heads, q_length, dim = q.shape
    kv_heads, kv_length = k.shape[1:3]
    group, pairs, splits = heads // kv_heads, batch * kv_heads, parts[0].shape[2]
    sms, blocks = device.sm_count(q.device), -(-kv_length // config.block_kv)
    longest = config.split // config.block_kv * (4 if splits > config.short_splits else 1)
    runs = _runs_per_row(pairs, splits, blocks, longest, sms)
    kept = triton.next_power_of_2(group * q_length)
    rows = max(8, kept)
    _decode_hopper_kernel[(min(2 * sms, pairs * runs),)](
        q, descriptor(k, config.block_kv), descriptor(v, config.block_kv), *parts, counter, o,
        q if sinks is None else sinks.contiguous(), q if starts is None else starts,
        q if lengths is None else lengths, scale, pairs, kv_heads, pairs * runs, runs, splits,
        q_length, kv_length, *q.stride()[:3], *o.stride()[:3], HAS_STARTS=starts is not None,
        HAS_LENGTHS=lengths is not None, HAS_SINKS=sinks is not None, GROUP=group,
        BLOCK_KV=config.block_kv, D=dim, ROWS=rows, KEPT=max(4, kept), SPLIT=config.split,
        SHORT=config.short_splits, QUERIES=shared_layout([rows, dim], q.dtype),
        WEIGHTS=shared_layout([rows, config.block_kv], q.dtype),
        SLOTS=_STAGED // (config.block_kv * dim), num_warps=4,
        # With the warps that idle beside the one that copies, two programs take all registers.
        maxnreg=128, enable_fp_fusion=False, **pdl(q.device),
    )  # fmt: skip
