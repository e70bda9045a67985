# (both: Gluon types the arguments of jit functions)
"""Few rows times weights of 4 bits, scheduled by hand: the bits of `weight_only`, sooner.

Computes: as `weight_only_matmul`, with scales of the rows' dtype, without zeros.
Reduction order: that of `matmul` where it has one K-group: ascending k, 16 columns an instruction.
Schedule: each warp unpacks the weights of 8 or 16 output features and multiplies them by mma.sync,
    whose operand they are, so that twice as many warps share the work as wgmma lets. Weights are
    asked for before the kernel that writes the rows has ended.
Dtypes: bfloat16.
"""

from __future__ import annotations

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ndcheck_kernels.cuda.dependent_launch import pdl
from ndcheck_kernels.cuda.gluon_names import async_load, thread_barrier
from ndcheck_kernels.cuda.products.pairs import BF16_PAIRS, REGISTERS
from ndcheck_kernels.cuda.products.weight_only import FewRowsConfig
from ndcheck_kernels.ops.weight_only import Packed

_PAIRS, _REGISTERS = gl.constexpr(BF16_PAIRS), gl.constexpr(REGISTERS)


@gluon.jit
def _ask(
    step, first_n, codes_desc, s_desc, w_smem, s_smem, x_bytes: gl.constexpr, ready, more,
    GROUP: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """For the codes and scales of a step."""
    stage = step % STAGES
    size: gl.constexpr = codes_desc.block_type.nbytes + s_desc.block_type.nbytes + x_bytes
    mbarrier.expect(ready.index(stage), size, pred=more)
    codes_at = [first_n, step * (BLOCK_K // 8)]
    async_load(codes_desc, codes_at, ready.index(stage), w_smem.index(stage), pred=more)
    scales_at = [step * BLOCK_K // GROUP, first_n]
    async_load(s_desc, scales_at, ready.index(stage), s_smem.index(stage), pred=more)


@gluon.jit(do_not_specialize=["M"])
def _weight_only_few_kernel(
    x_desc, codes_desc, s_desc, c_ptr, y_ptr, M, N, K, stride_cm, stride_cn, stride_ym,
    HAS_C: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, WORDS: gl.constexpr,
    SCALES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """WORDS and SCALES: how words [BLOCK_N, W] and scales [G, BLOCK_N, W / G] lie in registers."""
    DTYPE: gl.constexpr = x_desc.dtype
    W: gl.constexpr = BLOCK_K // 8
    G: gl.constexpr = s_desc.block_type.shape[0]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    num_m = gl.cdiv(M, BLOCK_M)
    first_m = (gl.program_id(0) % num_m) * BLOCK_M
    first_n = (gl.program_id(0) // num_m) * BLOCK_N
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    w_smem = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N, W], codes_desc.layout)
    s_smem = gl.allocate_shared_memory(DTYPE, [STAGES, G, BLOCK_N], s_desc.layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    thread_barrier()
    if PDL:
        gdc_launch_dependents()
    steps = K // BLOCK_K
    x_bytes: gl.constexpr = x_desc.block_type.nbytes
    for i in gl.static_range(STAGES - 1):
        _ask(
            i, first_n, codes_desc, s_desc, w_smem, s_smem, x_bytes, ready, i < steps, GROUP,
            BLOCK_K, STAGES,
        )  # fmt: skip
    if PDL:
        gdc_wait()
    for i in gl.static_range(STAGES - 1):
        async_load(
            x_desc, [first_m, i * BLOCK_K], ready.index(i), x_smem.index(i), pred=i < steps
        )  # fmt: skip
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, MMA)
    zero = gl.full([BLOCK_N, W], 0x43084308, gl.int32, WORDS)  # 136.0 twice: that of code 8
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        # All warps have read what the next copies write over: the stage of the step before.
        thread_barrier()
        asked = step + STAGES - 1
        _ask(
            asked, first_n, codes_desc, s_desc, w_smem, s_smem, x_bytes, ready, asked < steps,
            GROUP, BLOCK_K, STAGES,
        )  # fmt: skip
        into = asked % STAGES
        async_load(
            x_desc, [first_m, asked * BLOCK_K], ready.index(into), x_smem.index(into),
            pred=asked < steps,
        )  # fmt: skip
        words = w_smem.index(stage).load(WORDS)
        # Transposed in registers: Triton 3.6 misreads a transposed view of unswizzled memory.
        scale = s_smem.index(stage).load(gl.SliceLayout(2, SCALES))
        scale = scale.to(gl.uint16, bitcast=True).to(gl.int32) * 0x10001
        scale = gl.expand_dims(scale, 2).broadcast_to([G, BLOCK_N, W // G])
        scale = gl.reshape(gl.permute(scale, [1, 0, 2]), [BLOCK_N, W])
        scale = gl.convert_layout(scale, WORDS, assert_trivial=True)
        p = gl.inline_asm_elementwise(
            _PAIRS, _REGISTERS, [words, zero, scale],
            dtype=(gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
        low = gl.join(gl.join(p[0], p[1]), gl.join(p[2], p[3]))
        high = gl.join(gl.join(p[4], p[5]), gl.join(p[6], p[7]))
        w = gl.reshape(gl.join(low, high), [BLOCK_N, W // 8, 8, 2, 2, 2])
        w = gl.reshape(gl.permute(w, [0, 1, 5, 4, 3, 2]), [BLOCK_N, BLOCK_K])
        w = gl.permute(w.to(DTYPE, bitcast=True), [1, 0])
        w = gl.convert_layout(w, RIGHT, assert_trivial=True)
        acc = mma_v2(x_smem.index(stage).load(LEFT), w, acc)
    offs_m = first_m.to(gl.int64) + gl.arange(0, BLOCK_M, gl.SliceLayout(1, MMA))[:, None]
    offs_n = first_n.to(gl.int64) + gl.arange(0, BLOCK_N, gl.SliceLayout(0, MMA))[None, :]
    mask = (offs_m < M) & (offs_n < N)
    if HAS_C:
        c = gl.load(c_ptr + offs_m * stride_cm + offs_n * stride_cn, mask, other=0.0)
        acc += c.to(gl.float32)
    gl.store(y_ptr + offs_m * stride_ym + offs_n, acc.to(y_ptr.dtype.element_ty), mask)


def launch(
    x: torch.Tensor, packed: Packed, addend: torch.Tensor | None, y: torch.Tensor,
    config: FewRowsConfig,
) -> None:  # fmt: skip
    """Write x [M, K] times the weight, and ``addend`` [M, N], to y [M, N]."""
    (m, n), k = y.shape, packed.columns
    block_n, n_words = config.per_warp * config.warps, config.block_k // 8
    in_block = max(1, config.block_k // packed.group_size)
    c = y if addend is None else addend
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, block_n)
    _weight_only_few_kernel[(tiles,)](
        _descriptor(x, [config.block_m, config.block_k]),
        _descriptor(packed.codes.view(torch.int32), [block_n, n_words]),
        _descriptor(packed.scales, [in_block, block_n]), c, y, m, n, k, *c.stride(), y.stride(0),
        HAS_C=addend is not None, GROUP=packed.group_size, BLOCK_M=config.block_m, BLOCK_N=block_n,
        BLOCK_K=config.block_k, WARPS=config.warps, STAGES=config.stages,
        WORDS=_layout(config, (n_words,)), SCALES=_layout(config, (in_block, n_words // in_block)),
        num_warps=config.warps, **pdl(y.device),
    )  # fmt: skip


_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.int32: gl.int32}


def _descriptor(t: torch.Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[t.dtype])
    return TensorDescriptor.from_tensor(t, block, layout)


def _layout(config: FewRowsConfig, words: tuple[int, ...]) -> gl.DistributedLinearLayout:
    """Of words [N, W] or [G, N, W / G] in registers, as operand B of m16n8k16 has their columns.

    A word is (run, lane of four, half of the run) by its bits, as `ops.weight_only` has it.
    """

    def at(word: int) -> list[int]:
        return [*(word // words[-1] for _ in words[1:]), 0, word % words[-1]]

    def row(n: int) -> list[int]:
        return [*(0 for _ in words[1:]), n, 0]

    n_words = math.prod(words)
    warps = 8 * config.warps
    registers = [at(1), *(at(1 << i) for i in range(3, n_words.bit_length() - 1))]
    registers += [row(warps)] if config.per_warp == 16 else []
    lanes = [at(2), at(4), row(1), row(2), row(4)]
    of_warps = [row(8 << i) for i in range(config.warps.bit_length() - 1)]
    shape = [*words[:-1], warps * config.per_warp // 8, words[-1]]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], shape)


__all__ = ["launch"]
