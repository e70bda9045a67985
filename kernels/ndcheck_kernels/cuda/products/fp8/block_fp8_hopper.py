"""Products of FP8 blocks scheduled for Hopper by hand: the bits of `fp8_matmul`.

Computes: as `fp8_matmul` of such weights.
Reduction order: that of `fp8_matmul`: every product and sum below stands there too, in the same
    order.
Schedule: a program per SM walks over tiles. Warps of their own copy blocks of rows and weights to
    shared memory (TMA). Two warpgroups multiply, out of step: while one adds its block to its sum,
    the tensor cores work for the other. Tiles of 128 rows: each has 64 of them. Tiles of 64 rows:
    the warpgroups take turns at K-groups, each with blocks of its own in shared memory, and hand
    each other the total of the groups before.
Depends on: as `fp8_matmul`.
Dtypes: as `fp8_matmul`.
Not claimed: other devices than those of compute capability 9.0, Triton before 3.6.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import pdl
from ndcheck_kernels.cuda.gluon_names import async_load
from ndcheck_kernels.cuda.products.fp8.fp8_configs import Fp8Config
from ndcheck_kernels.ops.block_fp8 import BLOCK

_HALF = gl.constexpr(64)  # the rows of one warpgroup


@gluon.jit
def _turns(M, N, groups, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """How many K-groups this program has to add, those of all its tiles."""
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    return gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0)) * groups


@gluon.jit
def _tile_at(turn, M, groups, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """First row, first output and K-group of this program's turn of that number."""
    tile = gl.program_id(0) + turn // groups * gl.num_programs(0)
    num_m = gl.cdiv(M, BLOCK_M)
    return tile % num_m * BLOCK_M, tile // num_m * BLOCK_N, turn % groups


@gluon.jit
def _load(
    own: gl.constexpr, x_desc, w_desc, x_smem, w_smem, full, empty, M, N, K,
    BY_GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warp that copies: the blocks of all K-groups, or of those of one warpgroup."""
    if BY_GROUPS or own == 0:
        step: gl.constexpr = 2 if BY_GROUPS else 1
        groups = gl.cdiv(K, 1024)
        block = 0
        for turn in range(own, _turns(M, N, groups, BLOCK_M, BLOCK_N), step):
            first_m, first_n, group = _tile_at(turn, M, groups, BLOCK_M, BLOCK_N)
            for k in range(group * 1024, gl.minimum(K, group * 1024 + 1024), 128):
                stage = own * STAGES + block % STAGES
                mbarrier.wait(empty.index(stage), ((block // STAGES) & 1) ^ 1)
                mbarrier.expect(
                    full.index(stage), x_desc.block_type.nbytes + w_desc.block_type.nbytes
                )
                async_load(x_desc, [first_m, k], full.index(stage), x_smem.index(stage))
                async_load(w_desc, [first_n, k], full.index(stage), w_smem.index(stage))
                block += 1


@gluon.jit
def _begin(
    s_ptr, t_ptr, turn, first_row: gl.constexpr, M, N, K, stride_sb, stride_tn,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Of a turn: its first row and output, where its scales lie, and the number of its last block.

    Behind the last turn the last one's, whose scales nobody uses.
    """
    groups = gl.cdiv(K, 1024)
    turn = gl.minimum(turn, _turns(M, N, groups, BLOCK_M, BLOCK_N) - 1)
    first_m, first_n, group = _tile_at(turn, M, groups, BLOCK_M, BLOCK_N)
    first_m += first_row
    s_ptr += group.to(gl.int64) * 8 * stride_sb + first_m
    t_ptr += (first_n // 128).to(gl.int64) * stride_tn + group * 8
    return first_m, first_n, s_ptr, t_ptr, gl.minimum(gl.cdiv(K, 128) - group * 8, 8) - 1


@gluon.jit
def _scales(s_ptr, t_ptr, number, last, first_m, M, stride_sb, layout: gl.constexpr):
    """Those of 64 rows and of the weights, in a turn's block of that number, or its last."""
    rows = gl.arange(0, _HALF, gl.SliceLayout(1, layout))
    block = gl.minimum(number, last)
    s = gl.load(s_ptr + block * stride_sb + rows, first_m + rows < M, other=0.0)
    return s, gl.load(t_ptr + block)


@gluon.jit
def _add_block(
    acc, s, t, s_ptr, t_ptr, number, last, first_m, M, stride_sb, x_smem, w_smem, full, empty,
    place, first_row: gl.constexpr, first_place: gl.constexpr, STAGES: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """acc, and the block of that number added to it; and scales of the block after the next."""
    stage = first_place + place % STAGES
    zeros = gl.zeros(acc.shape, gl.float32, layout)
    mbarrier.wait(full.index(stage), (place // STAGES) & 1)
    x = x_smem.index(stage).slice(first_row, _HALF)
    w = w_smem.index(stage).permute((1, 0))
    part = warpgroup_mma(x, w, zeros, use_acc=False, is_async=True)
    scale = s * t
    s, t = _scales(s_ptr, t_ptr, number + 2, last, first_m, M, stride_sb, layout)
    part = warpgroup_mma_wait(0, deps=[part])
    mbarrier.arrive(empty.index(stage), count=1)
    return gl.fma(part, scale[:, None], acc), s, t


@gluon.jit
def _multiply(
    own: gl.constexpr, x_smem, w_smem, tot_smem, full, empty, turns, s_ptr, t_ptr, c_ptr, y_ptr, M,
    N, K, stride_sb, stride_tn, stride_cm, stride_cn, stride_ym, HAS_C: gl.constexpr,
    BY_GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 rows of each tile, or every other K-group of them.

    Scales are read two blocks ahead, and those that a turn begins with a turn ahead. Even and odd
    blocks have registers of their own for them, as a copy would wait for what is read.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    first_turn: gl.constexpr = own if BY_GROUPS else 0
    first_place: gl.constexpr = first_turn * STAGES
    step: gl.constexpr = 2 if BY_GROUPS else 1
    first_row: gl.constexpr = 0 if BY_GROUPS else own * _HALF
    groups = gl.cdiv(K, 1024)
    tot = gl.zeros([_HALF, BLOCK_N], gl.float32, layout)
    place = 0
    taken = 0
    next_m, next_n, next_s_ptr, next_t_ptr, next_last = _begin(
        s_ptr, t_ptr, first_turn, first_row, M, N, K, stride_sb, stride_tn, BLOCK_M, BLOCK_N
    )
    next_s0, next_t0 = _scales(next_s_ptr, next_t_ptr, 0, next_last, next_m, M, stride_sb, layout)
    next_s1, next_t1 = _scales(next_s_ptr, next_t_ptr, 1, next_last, next_m, M, stride_sb, layout)
    for turn in range(first_turn, _turns(M, N, groups, BLOCK_M, BLOCK_N), step):
        first_m, first_n, own_s_ptr, own_t_ptr, last = (
            next_m, next_n, next_s_ptr, next_t_ptr, next_last,
        )  # fmt: skip
        s0, t0, s1, t1 = next_s0, next_t0, next_s1, next_t1
        next_m, next_n, next_s_ptr, next_t_ptr, next_last = _begin(
            s_ptr, t_ptr, turn + step, first_row, M, N, K, stride_sb, stride_tn, BLOCK_M, BLOCK_N
        )
        next_s0, next_t0 = _scales(
            next_s_ptr, next_t_ptr, 0, next_last, next_m, M, stride_sb, layout
        )
        next_s1, next_t1 = _scales(
            next_s_ptr, next_t_ptr, 1, next_last, next_m, M, stride_sb, layout
        )
        acc = gl.zeros([_HALF, BLOCK_N], gl.float32, layout)
        for number in range(0, last + 1, 2):
            acc, s0, t0 = _add_block(
                acc, s0, t0, own_s_ptr, own_t_ptr, number, last, first_m, M, stride_sb, x_smem,
                w_smem, full, empty, place, first_row, first_place, STAGES, layout,
            )  # fmt: skip
            place += 1
            if number < last:
                acc, s1, t1 = _add_block(
                    acc, s1, t1, own_s_ptr, own_t_ptr, number + 1, last, first_m, M, stride_sb,
                    x_smem, w_smem, full, empty, place, first_row, first_place, STAGES, layout,
                )  # fmt: skip
                place += 1
        group = turn % groups
        if BY_GROUPS:
            mbarrier.wait(turns.index(own), (taken & 1) ^ (1 - own))
            tot = gl.where(group == 0, 0.0, tot_smem.load(layout)) + acc
            tot_smem.store(tot)
            mbarrier.arrive(turns.index(1 - own), count=1)
            taken += 1
        else:
            tot = gl.where(group == 0, 0.0, tot) + acc
        if group == groups - 1:
            offs_m = first_m + gl.arange(0, _HALF, gl.SliceLayout(1, layout))
            offs_n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            rows = offs_m.to(gl.int64)[:, None]
            y = tot
            if HAS_C:
                c_ptrs = c_ptr + rows * stride_cm + offs_n.to(gl.int64)[None, :] * stride_cn
                y += gl.load(c_ptrs, mask, other=0.0).to(gl.float32)
            y_ptrs = y_ptr + rows * stride_ym + offs_n[None, :]
            gl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask)


@gluon.jit(do_not_specialize=["M", "N", "K", "stride_sb", "stride_tn"])
def _block_fp8_hopper_kernel(
    x_desc, w_desc, s_ptr, t_ptr, c_ptr, y_ptr, M, N, K, stride_sb, stride_tn, stride_cm, stride_cn,
    stride_ym, HAS_C: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """STAGES: blocks that have a place in shared memory, for each warpgroup if by K-groups."""
    if PDL:
        gdc_launch_dependents()
    BY_GROUPS: gl.constexpr = BLOCK_M == _HALF
    rings: gl.constexpr = 2 if BY_GROUPS else 1
    places: gl.constexpr = rings * STAGES
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [places, BLOCK_M, 128], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [places, BLOCK_N, 128], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [places, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [places, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    tot_smem = turns  # It stands in for none.
    if BY_GROUPS:
        # Eight rows of a warp, each of 32 bytes, lie in different banks.
        swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
        tot_smem = gl.allocate_shared_memory(gl.float32, [_HALF, BLOCK_N], swizzled)
    for stage in gl.static_range(places):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=3 - rings)
    for each in gl.static_range(2):
        mbarrier.init(turns.index(each), count=1)
    fence_async_shared()
    if PDL:
        gdc_wait()  # Only now: barriers are made while the kernel before this one ends.
    # Gluon forgets that an argument is a constant when tuples are added, so they stand out in full.
    gl.warp_specialize(
        [
            (_multiply, (
                gl.constexpr(0), x_smem, w_smem, tot_smem, full, empty, turns, s_ptr, t_ptr, c_ptr,
                y_ptr, M, N, K, stride_sb, stride_tn, stride_cm, stride_cn, stride_ym, HAS_C,
                BY_GROUPS, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_multiply, (
                gl.constexpr(1), x_smem, w_smem, tot_smem, full, empty, turns, s_ptr, t_ptr, c_ptr,
                y_ptr, M, N, K, stride_sb, stride_tn, stride_cm, stride_cn, stride_ym, HAS_C,
                BY_GROUPS, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_load, (
                gl.constexpr(0), x_desc, w_desc, x_smem, w_smem, full, empty, M, N, K, BY_GROUPS,
                BLOCK_M, BLOCK_N, STAGES,
            )),
            (_load, (
                gl.constexpr(1), x_desc, w_desc, x_smem, w_smem, full, empty, M, N, K, BY_GROUPS,
                BLOCK_M, BLOCK_N, STAGES,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip


def multiply(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    addend: torch.Tensor | None, y: torch.Tensor, config: Fp8Config,
) -> None:  # fmt: skip
    """Write the product of operands as `fp8_matmul` takes them to y [M, N]."""
    (m, k), n = codes.shape, weight.shape[0]
    c = y if addend is None else addend.expand(m, n)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    _block_fp8_hopper_kernel[(min(device.sm_count(y.device), tiles),)](
        _descriptor(codes, config.block_m), _descriptor(weight, config.block_n), row_scales, scales,
        c, y, m, n, k, row_scales.stride(1), scales.stride(0), *c.stride(), y.stride(0),
        HAS_C=addend is not None, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        STAGES=config.stages * config.block_m // 128, num_warps=4, enable_fp_fusion=False,
        **pdl(y.device),
    )  # fmt: skip


def _descriptor(t: torch.Tensor, rows: int) -> TensorDescriptor:
    block = [rows, BLOCK]
    return TensorDescriptor.from_tensor(
        t, block, gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)
    )
