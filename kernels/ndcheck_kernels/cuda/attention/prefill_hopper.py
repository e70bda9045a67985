"""Prefill attention scheduled for Hopper by hand: the bits of `prefill`, sooner.

Computes: as `attention`, without a window or a cap on the scores.
Reduction order: that of `attention`: every product, maximum and sum below stands there too, in the
    same order.
Schedule: a program per SM walks over tiles of 128 queries, those that see most keys first, to and
    fro over the programs, so that all see about as many. One warp copies blocks of keys and values
    and the next tile's queries to shared memory (TMA); two warpgroups take 64 queries each and
    take turns, so that one's softmax runs while the tensor cores work for the other. The total of
    the splits before waits in shared memory: registers have room for one accumulator.
Dtypes: bfloat16, float16; head_dim 64 or 128.
"""

from __future__ import annotations

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
    softmax,
)
from ndcheck_kernels.cuda.attention.hopper_tiles import BLOCK_Q, tile_at, tile_count
from ndcheck_kernels.cuda.attention.splits import LOG2_E, row_bounds
from ndcheck_kernels.cuda.configs import AttentionConfig
from ndcheck_kernels.cuda.gluon_names import async_load

_HALF = gl.constexpr(64)  # the queries of one warpgroup
_STAGED_KEYS = 256
"""Keys, and values, that have a place in shared memory."""


@gluon.jit
def _opens_split(offset, SPLIT: gl.constexpr, SHORT: gl.constexpr):
    """Does a split start here, so many tokens from the row's first?"""
    short: gl.constexpr = SHORT * SPLIT
    return gl.where(offset < short, offset % SPLIT, (offset - short) % (4 * SPLIT)) == 0


@gluon.jit
def _finished(den):
    """The denominators as they are, not before all probabilities are there.

    The assembler puts what waits for the tensor cores before as much as it can, but not before a
    trap (no denominator is near -6e18): a softmax must not wait for the product that it hides.
    """
    return gl.inline_asm_elementwise(
        "{.reg .pred p; setp.eq.s32 p, $1, 0xdeadbeef; @p trap; mov.b32 $0, $1;}", "=r,r", [den],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _merge(m, den, acc, split_m, split_den, split_acc, rows: gl.constexpr):
    """Add a split to the total of those before it."""
    new_m = gl.maximum(m, split_m)
    safe_m = gl.where(new_m == float("-inf"), 0.0, new_m)
    fade = gl.exp2(m - safe_m)
    split_fade = gl.exp2(split_m - safe_m)
    den = gl.fma(den, fade, split_den * split_fade)
    zeros = gl.full_like(acc, 0.0)
    fade = zeros + gl.convert_layout(fade, rows)[:, None]
    split_fade = gl.convert_layout(split_fade, rows)
    return new_m, den, gl.fma(acc, fade, split_acc * split_fade[:, None])


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, starts_ptr, lengths_ptr, batches, heads, q_blocks, q_length, kv_length,
    HAS_STARTS: gl.constexpr, HAS_LENGTHS: gl.constexpr, GROUP: gl.constexpr,
    BLOCK_KV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies: queries of each tile, then its keys and values, block by block."""
    block = 0
    for tile in range(tile_count(batches * heads * q_blocks)):
        head, batch, first_q = tile_at(tile, batches, heads, q_blocks)
        start, end = row_bounds(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
        stop = gl.minimum(end, end - q_length + first_q + BLOCK_Q)
        mbarrier.wait(q_empty, (tile & 1) ^ 1)
        mbarrier.expect(q_full, q_desc.block_type.nbytes)
        async_load(q_desc, [batch, head, first_q, 0], q_full, q_smem)
        for n in range(start, stop, BLOCK_KV):
            stage = block % STAGES
            used = (block // STAGES) & 1
            at = [batch, head // GROUP, n, 0]
            mbarrier.wait(k_empty.index(stage), used ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            async_load(k_desc, at, k_full.index(stage), k_smem.index(stage))
            mbarrier.wait(v_empty.index(stage), used ^ 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            async_load(v_desc, at, v_full.index(stage), v_smem.index(stage))
            block += 1


@gluon.jit
def _attend(
    half: gl.constexpr, q_smem, k_smem, v_smem, tot_smem, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, turns, o_ptr, sinks_ptr, starts_ptr, lengths_ptr, batches, heads, q_blocks, q_length,
    kv_length, scale, stride_ob, stride_oh, stride_om, HAS_STARTS: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    HAS_SINKS: gl.constexpr, BLOCK_KV: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    SPLIT: gl.constexpr, SHORT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 queries of each tile, over all of the tile's blocks.

    The products of a block's values and of the next block's keys run while the other warpgroup does
    its softmax; `turns` says whose products may start.
    """
    dtype: gl.constexpr = q_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    v_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    no_scores = gl.zeros([_HALF, BLOCK_KV], gl.float32, s_layout)
    q = q_smem.reshape([BLOCK_Q, D]).slice(half * _HALF, _HALF)
    block = 0
    turn = 0
    for tile in range(tile_count(batches * heads * q_blocks)):
        head, batch, first_q = tile_at(tile, batches, heads, q_blocks)
        start, end = row_bounds(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
        stop = gl.minimum(end, end - q_length + first_q + BLOCK_Q)
        first_q += half * _HALF
        first_position = end - q_length + first_q
        positions = first_position + gl.arange(0, _HALF, s_rows)
        n_blocks = gl.cdiv(gl.maximum(stop - start, 0), BLOCK_KV)
        n_clear = gl.maximum(gl.minimum(first_position + 1, stop) - start, 0) // BLOCK_KV
        m = gl.full([_HALF], float("-inf"), gl.float32, s_rows)
        den = gl.zeros([_HALF], gl.float32, s_rows)
        acc = gl.zeros([_HALF, DV], gl.float32, o_layout)
        tot_m = m
        tot_den = den
        tot_smem.store(acc)
        if HAS_SINKS:
            sink = gl.load(sinks_ptr + head).to(gl.float32) * LOG2_E
            tot_m = gl.zeros([_HALF], gl.float32, s_rows) + sink
            tot_den += 1.0
        mbarrier.wait(q_full, tile & 1)
        if n_blocks > 0:
            stage = block % STAGES
            mbarrier.wait(k_full.index(stage), (block // STAGES) & 1)
            mbarrier.wait(turns.index(half), (turn & 1) ^ (1 - half))
            k = k_smem.index(stage).reshape([BLOCK_KV, D]).permute((1, 0))
            scores = warpgroup_mma(q, k, no_scores, use_acc=False, is_async=True)
            mbarrier.arrive(turns.index(1 - half), count=1)
            turn += 1
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(stage), count=1)
            p, m, den, fade = softmax(scores, start, positions, m, den, scale, True, 1, s_layout)
            p = gl.convert_layout(p.to(dtype), p_layout)
            for masked in gl.static_range(2):
                low = 1 if masked == 0 else gl.maximum(n_clear, 1)
                high = n_clear if masked == 0 else n_blocks
                for i in range(low, high):
                    n = start + i * BLOCK_KV
                    last = block % STAGES
                    last_used = (block // STAGES) & 1
                    block += 1
                    stage = block % STAGES
                    mbarrier.wait(k_full.index(stage), (block // STAGES) & 1)
                    mbarrier.wait(v_full.index(last), last_used)
                    mbarrier.wait(turns.index(half), (turn & 1) ^ (1 - half))
                    k = k_smem.index(stage).reshape([BLOCK_KV, D]).permute((1, 0))
                    scores = warpgroup_mma(q, k, no_scores, use_acc=False, is_async=True)
                    v = v_smem.index(last).reshape([BLOCK_KV, DV])
                    flying = warpgroup_mma(p, v, acc, is_async=True)
                    mbarrier.arrive(turns.index(1 - half), count=1)
                    turn += 1
                    scores = warpgroup_mma_wait(1, deps=[scores])
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    opens = _opens_split(n - start, SPLIT, SHORT)
                    split_m = m
                    split_den = den
                    m = gl.where(opens, float("-inf"), m)
                    den = gl.where(opens, 0.0, den)
                    new_p, m, den, fade = softmax(
                        scores, n, positions, m, den, scale, masked == 1, 1, s_layout
                    )
                    new_p = gl.convert_layout(new_p.to(dtype), p_layout)
                    den = _finished(den)
                    acc, _, p = warpgroup_mma_wait(0, deps=[flying, p, new_p])
                    mbarrier.arrive(v_empty.index(last), count=1)
                    if opens:
                        tot_m, tot_den, tot = _merge(
                            tot_m, tot_den, tot_smem.load(o_layout), split_m, split_den, acc, o_rows
                        )
                        tot_smem.store(tot)
                        acc = gl.zeros([_HALF, DV], gl.float32, o_layout)
                    else:
                        acc = acc * gl.convert_layout(fade, o_rows)[:, None]
            mbarrier.arrive(q_empty, count=1)  # No product of this tile reads queries any more.
            stage = block % STAGES
            mbarrier.wait(v_full.index(stage), (block // STAGES) & 1)
            v = v_smem.index(stage).reshape([BLOCK_KV, DV])
            if HAS_LENGTHS:
                # Only a tile's last block can reach behind the row's end.
                last_first = start + (n_blocks - 1) * BLOCK_KV
                if last_first + BLOCK_KV > end:
                    forget_unused(v, last_first, end, v_layout)
            acc = warpgroup_mma(p, v, acc, is_async=True)
            acc, _ = warpgroup_mma_wait(0, deps=[acc, p])
            mbarrier.arrive(v_empty.index(stage), count=1)
            block += 1
        else:
            mbarrier.arrive(q_empty, count=1)
        tot_m, tot_den, tot = _merge(tot_m, tot_den, tot_smem.load(o_layout), m, den, acc, o_rows)
        tot_den = gl.convert_layout(tot_den, o_rows)
        o = tot / gl.where(tot_den == 0.0, 1.0, tot_den)[:, None]
        offs_q = first_q + gl.arange(0, _HALF, o_rows)
        offs_v = gl.arange(0, DV, gl.SliceLayout(0, o_layout))
        o_ptrs = o_ptr + batch.to(gl.int64) * stride_ob + head * stride_oh
        o_ptrs += offs_q.to(gl.int64)[:, None] * stride_om + offs_v[None, :]
        gl.store(o_ptrs, o.to(dtype), (offs_q < q_length)[:, None])


# It takes seconds to compile: once for all numbers of rows and tokens.
@gluon.jit(
    do_not_specialize=["batches", "heads", "q_blocks", "q_length", "kv_length"],
    do_not_specialize_on_alignment=["sinks_ptr", "starts_ptr", "lengths_ptr"],
)
def _prefill_hopper_kernel(
    q_desc, k_desc, v_desc, o_ptr, sinks_ptr, starts_ptr, lengths_ptr, scale, batches, heads,
    q_blocks, q_length, kv_length, stride_ob, stride_oh, stride_om, HAS_STARTS: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, HAS_SINKS: gl.constexpr, GROUP: gl.constexpr,
    BLOCK_KV: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, SPLIT: gl.constexpr,
    SHORT: gl.constexpr, STAGES: gl.constexpr, TOTAL: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_Q, D], q_desc.layout)
    tot_0 = gl.allocate_shared_memory(gl.float32, [_HALF, DV], TOTAL)
    tot_1 = gl.allocate_shared_memory(gl.float32, [_HALF, DV], TOTAL)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_KV, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_KV, DV], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    for half in gl.static_range(2):
        mbarrier.init(turns.index(half), count=1)
    fence_async_shared()
    # Gluon forgets that an argument is a constant when tuples are added, so they stand out in full.
    gl.warp_specialize(
        [
            (_attend, (
                gl.constexpr(0), q_smem, k_smem, v_smem, tot_0, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, turns, o_ptr, sinks_ptr, starts_ptr, lengths_ptr, batches, heads,
                q_blocks, q_length, kv_length, scale, stride_ob, stride_oh, stride_om, HAS_STARTS,
                HAS_LENGTHS, HAS_SINKS, BLOCK_KV, D, DV, SPLIT, SHORT, STAGES,
            )),
            (_attend, (
                gl.constexpr(1), q_smem, k_smem, v_smem, tot_1, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, turns, o_ptr, sinks_ptr, starts_ptr, lengths_ptr, batches, heads,
                q_blocks, q_length, kv_length, scale, stride_ob, stride_oh, stride_om, HAS_STARTS,
                HAS_LENGTHS, HAS_SINKS, BLOCK_KV, D, DV, SPLIT, SHORT, STAGES,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, starts_ptr, lengths_ptr, batches, heads, q_blocks, q_length,
                kv_length, HAS_STARTS, HAS_LENGTHS, GROUP, BLOCK_KV, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, starts: torch.Tensor | None,
    lengths: torch.Tensor | None, sinks: torch.Tensor | None, scale: float, config: AttentionConfig,
) -> None:  # fmt: skip
    """Write the attention of q [B, H, L, D] over k and v [B, KV heads, T, D] to o [B, H, L, DV].

    `starts` and `lengths` [B] are int32, `sinks` [H]; `scale` holds the factor of exp2.
    """
    batch, heads, q_length, dim = q.shape
    kv_heads, kv_length, dim_v = v.shape[1:]
    q_blocks = triton.cdiv(q_length, BLOCK_Q.value)
    programs = min(device.sm_count(q.device), batch * heads * q_blocks)
    _prefill_hopper_kernel[(programs,)](
        descriptor(q, BLOCK_Q.value), descriptor(k, config.block_kv),
        descriptor(v, config.block_kv), o, q if sinks is None else sinks.contiguous(),
        q if starts is None else starts, q if lengths is None else lengths, scale, batch, heads,
        q_blocks, q_length, kv_length, *o.stride()[:3], HAS_STARTS=starts is not None,
        HAS_LENGTHS=lengths is not None, HAS_SINKS=sinks is not None, GROUP=heads // kv_heads,
        BLOCK_KV=config.block_kv, D=dim, DV=dim_v, SPLIT=config.split, SHORT=config.short_splits,
        STAGES=_STAGED_KEYS // config.block_kv, TOTAL=_own_places(dim_v), num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip


def _own_places(columns: int) -> gl.SharedLinearLayout:
    """Of [64, columns]: what one thread holds of a product in four adjacent places, so that each of
    its accesses takes 16 bytes, and a warp's are adjacent.
    """
    far = [[0, 1 << bit] for bit in range(3, columns.bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.SharedLinearLayout([[0, 1], [8, 0], *lanes, [16, 0], [32, 0], *far])
