"""FP8 weights times quantised rows, alone and in groups (experts), whatever a scale is of.

Computes: of weights and rows with a scale a block of 128 columns, what `ops.block_fp8` says: sum
    over blocks b of K of p[b] * (s[b] * t[b]), plus an addend. Of weights with a scale a tensor or
    an output and rows with one, what `ops.row_fp8` says: (sum over b of p[b]) * (s * t), likewise.
Reduction order: p[b] is accumulated by the tensor cores in ascending k from zero, 32 columns an
    instruction; in a group of 1024 columns, blocks in ascending order from 0, one fused
    multiply-add each, or where rows have one scale one addition; groups in ascending order from 0;
    then s * t, where it is one; the addend last; one rounding at the end.
    Few rows have a program for each group, and whoever comes last adds them; many have one program
    that walks over them.
Depends on: K, dtype, architecture. Not on N or M, the row's position or its neighbours: tiles and
    schedule are held to one bit class as in `matmul`.
Dtypes: float8_e4m3fn codes, float32 scales; result and addend bfloat16, float16 or float32.
Not claimed: devices older than compute capability 9.0, K that is no multiple of 16, rows beyond
    the last group, gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.cuda.products.fp8.fp8_configs import (
    Fp8Config,
    grouped_config,
    k_groups,
    product_config,
)
from ndcheck_kernels.cuda.products.grouped_matmul import _find_rows
from ndcheck_kernels.cuda.products.tiles import accumulate, offsets, sum_groups, zeros
from ndcheck_kernels.ops.block_fp8 import BLOCK

FIRST_CAPABILITY = 90


@triton.jit
def _sum_blocks(
    x_desc, w_desc, s_ptrs, t_ptr, first_m, first_w, first_k, last_k, mask_m, stride_sb,
    BY_BLOCK: tl.constexpr, WALK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """The blocks from column first_k to last_k, of several groups if WALK; scaled if BY_BLOCK.

    s_ptrs: a scale for each row of the tile, in the accumulator's shape; t_ptr: the weights'.
    Scales are read one block ahead: unlike the operands, no pipeline hides how long they take.
    A block's sum starts from zero: the tensor cores keep fewer bits than float32.
    """
    tot = zeros(BLOCK_M, BLOCK_N, SWAP)
    acc = zeros(BLOCK_M, BLOCK_N, SWAP)
    if BY_BLOCK:
        block = first_k // 128
        s = tl.load(s_ptrs + block.to(tl.int64) * stride_sb, mask_m, other=0.0)
        t = tl.load(t_ptr + block)
    for k in range(first_k, last_k, 128):
        if BY_BLOCK:
            scale = s * t
            following = tl.minimum(k // 128 + 1, (last_k - 1) // 128)
            s = tl.load(s_ptrs + following.to(tl.int64) * stride_sb, mask_m, other=0.0)
            t = tl.load(t_ptr + following)
        x = x_desc.load([first_m, k])  # [BLOCK_M, 128]
        w = w_desc.load([first_w, k])  # [BLOCK_N, 128]
        part = accumulate(x, w, zeros(BLOCK_M, BLOCK_N, SWAP), SWAP)
        if BY_BLOCK:  # noqa: SIM108 - in the jit compiler an expression has one type
            acc = tl.fma(part, tl.broadcast_to(scale, acc.shape), acc)
        else:
            acc = acc + part
        if WALK:  # noqa: SIM102 - the jit compiler drops it where it is false
            if (k + 128) % 1024 == 0:
                tot = tot + acc
                acc = zeros(BLOCK_M, BLOCK_N, SWAP)
    return tot + acc


@triton.jit
def _scale(acc, s_ptrs, t_ptr, offs_n, mask_m, N, span):
    """Times the scale of each row and that of each output, `span` of which share one."""
    s = tl.load(s_ptrs, mask_m, other=0.0)
    t = tl.load(t_ptr + offs_n.to(tl.int32) // span, offs_n < N, other=0.0)
    return acc * (s * t)


@triton.jit(do_not_specialize=["M", "stride_sb", "span"])
def _fp8_kernel(
    x_desc, w_desc, s_ptr, t_ptr, c_ptr, y_ptr, partial_ptr, counter_ptr, M, N, K,
    stride_sb, stride_tn, span, stride_cm, stride_cn, stride_ym, BY_BLOCK: tl.constexpr,
    PARTS: tl.constexpr, WALK: tl.constexpr, HAS_C: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """PARTS: programs of a tile, each with a K-group, or one that may WALK over several."""
    follow(PDL)
    tile, group = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    num_m = tl.cdiv(M, BLOCK_M)
    first_m, first_n = (tile % num_m) * BLOCK_M, (tile // num_m) * BLOCK_N
    first_k = group * 1024
    last_k = tl.minimum(K, first_k + 1024) if PARTS > 1 else K
    offs_m, offs_n = offsets(first_m, first_n, BLOCK_M, BLOCK_N, SWAP)
    acc = _sum_blocks(
        x_desc, w_desc, s_ptr + offs_m, t_ptr + (first_n // 128).to(tl.int64) * stride_tn, first_m,
        first_n, first_k, last_k, offs_m < M, stride_sb, BY_BLOCK, WALK, BLOCK_M, BLOCK_N, SWAP,
    )  # fmt: skip
    mask = (offs_m < M) & (offs_n < N)
    last = True
    if PARTS > 1:
        acc, last = sum_groups(
            acc, partial_ptr + offs_m * N + offs_n, M.to(tl.int64) * N, mask, group,
            counter_ptr + tile, PARTS,
        )  # fmt: skip
    if last:
        if not BY_BLOCK:
            acc = _scale(acc, s_ptr + offs_m, t_ptr, offs_n, offs_m < M, N, span)
        if HAS_C:
            c = tl.load(c_ptr + offs_m * stride_cm + offs_n * stride_cn, mask, other=0.0)
            acc += c.to(tl.float32)
        tl.store(y_ptr + offs_m * stride_ym + offs_n, acc.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M", "stride_sb", "span"])
def _grouped_fp8_kernel(
    x_desc, w_desc, s_ptr, t_ptr, y_ptr, partial_ptr, counter_ptr, ends_ptr, E, M, N, K, stride_sb,
    stride_te, stride_tn, span, stride_ym, BY_BLOCK: tl.constexpr, PARTS: tl.constexpr,
    WALK: tl.constexpr, E_BLOCK: tl.constexpr, SWAP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile may read rows and weights of the next group of rows, which it drops."""
    follow(PDL)
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    num_n = tl.cdiv(N, BLOCK_N)
    group, first_m, end = _find_rows(ends_ptr, tile // num_n, E, E_BLOCK, BLOCK_M)
    if group < E:
        first_n, first_k = (tile % num_n) * BLOCK_N, part * 1024
        last_k = tl.minimum(K, first_k + 1024) if PARTS > 1 else K
        offs_m, offs_n = offsets(first_m, first_n, BLOCK_M, BLOCK_N, SWAP)
        t_ptr += group.to(tl.int64) * stride_te
        acc = _sum_blocks(
            x_desc, w_desc, s_ptr + offs_m, t_ptr + (first_n // 128) * stride_tn, first_m,
            group * N + first_n, first_k, last_k, offs_m < end, stride_sb, BY_BLOCK, WALK, BLOCK_M,
            BLOCK_N, SWAP,
        )  # fmt: skip
        mask = (offs_m < end) & (offs_n < N)
        last = True
        if PARTS > 1:
            acc, last = sum_groups(
                acc, partial_ptr + offs_m * N + offs_n, M.to(tl.int64) * N, mask, part,
                counter_ptr + tile, PARTS,
            )  # fmt: skip
        if last:
            if not BY_BLOCK:
                acc = _scale(acc, s_ptr + offs_m, t_ptr, offs_n, offs_m < end, N, span)
            tl.store(y_ptr + offs_m * stride_ym + offs_n, acc.to(y_ptr.dtype.element_ty), mask)


def fp8_matmul(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    addend: torch.Tensor | None = None, *, dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """codes [M, K], weight [N, K], addend [N] or [M, N] -> [M, N].

    row_scales [M, K / 128] of stride (1, any) and scales [N / 128, K / 128]; or row_scales [M] and
    scales [S], each of N / S outputs.
    """
    n, k = weight.shape
    capability, by_block = device.capability(codes.device), _is_by_block(weight, scales)
    config = product_config(len(codes), n, k, capability, by_block=by_block)
    return _launch(codes, row_scales, weight, scales, addend, dtype, config)


def _launch(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    addend: torch.Tensor | None, dtype: torch.dtype, config: Fp8Config,
) -> torch.Tensor:  # fmt: skip
    (m, k), n, by_block = codes.shape, weight.shape[0], _is_by_block(weight, scales)
    _require(codes, row_scales, weight, scales)
    y = torch.empty((m, n), dtype=dtype, device=codes.device)
    if y.numel() == 0:
        return y
    if config.hopper and by_block and device.has_hopper_kernels(y.device):
        from ndcheck_kernels.cuda.products.fp8.block_fp8_hopper import multiply

        multiply(codes, row_scales, weight, scales, addend, y, config)
        return y
    c = y if addend is None else addend.expand(m, n)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    parts, walk, *shared = _split(config, k, y, tiles)
    strides = (row_scales.stride(1), scales.stride(0), 0) if by_block else (0, 0, n // len(scales))
    _fp8_kernel[(tiles * parts,)](
        TensorDescriptor.from_tensor(codes, [config.block_m, BLOCK]),
        TensorDescriptor.from_tensor(weight, [config.block_n, BLOCK]),
        row_scales, scales, c, y, *shared, m, n, k, *strides, *c.stride(), y.stride(0),
        BY_BLOCK=by_block, PARTS=parts, WALK=walk, HAS_C=addend is not None, SWAP=config.swap,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.warps,
        num_stages=config.stages, enable_fp_fusion=False, **pdl(y.device),
    )  # fmt: skip
    return y


def grouped_fp8_matmul(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    ends: torch.Tensor, *, dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """codes [P, K] in order of groups, weight [E, N, K], ends [E] int32 -> [P, N].

    Scales as `fp8_matmul` takes them, those of the weights with E in front.
    """
    capability = device.capability(codes.device)
    config = grouped_config(len(codes), len(weight), weight.shape[1], capability)
    return _launch_grouped(codes, row_scales, weight, scales, ends, dtype, config)


def _launch_grouped(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    ends: torch.Tensor, dtype: torch.dtype, config: Fp8Config,
) -> torch.Tensor:  # fmt: skip
    (m, k), (e, n, _), by_block = codes.shape, weight.shape, _is_by_block(weight, scales)
    _require(codes, row_scales, weight, scales)
    y = torch.empty((m, n), dtype=dtype, device=codes.device)
    if y.numel() == 0:
        return y
    # A group adds at most one tile that is not full.
    tiles = (min(e, m) + m // config.block_m) * triton.cdiv(n, config.block_n)
    parts, walk, *shared = _split(config, k, y, tiles)
    stride_sb = row_scales.stride(1) if by_block else 0
    strides = (scales.stride(1), 0) if by_block else (0, n // scales.shape[1])
    _grouped_fp8_kernel[(tiles * parts,)](
        TensorDescriptor.from_tensor(codes, [config.block_m, BLOCK]),
        TensorDescriptor.from_tensor(
            weight.as_strided((e * n, k), (weight.stride(1), 1)), [config.block_n, BLOCK]
        ),
        row_scales, scales, y, *shared, ends.to(torch.int32).contiguous(), e, m, n, k,
        stride_sb, scales.stride(0), *strides, y.stride(0), BY_BLOCK=by_block, PARTS=parts,
        WALK=walk, E_BLOCK=triton.next_power_of_2(e), SWAP=config.swap, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, num_warps=config.warps, num_stages=config.stages,
        enable_fp_fusion=False, **pdl(y.device),
    )  # fmt: skip
    return y


def _split(
    config: Fp8Config, k: int, y: torch.Tensor, tiles: int
) -> tuple[int, bool, torch.Tensor, torch.Tensor]:
    """PARTS and WALK, and what the programs of a tile share: their parts, and a counter."""
    groups = k_groups(k)
    if groups == 1 or not config.parallel:
        return 1, groups > 1, y, y  # The tensors stand in for none.
    partial = torch.empty((groups, *y.shape), dtype=torch.float32, device=y.device)
    return groups, False, partial, device.counters(tiles, y.device)


def _is_by_block(weight: torch.Tensor, scales: torch.Tensor) -> bool:
    """Is a scale of 128 x 128 weights, and not of whole outputs?"""
    return scales.dim() == weight.dim()


def _require(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
) -> None:
    """Raises ValueError for what TMA cannot read, or the device cannot multiply."""
    if device.capability(codes.device) < FIRST_CAPABILITY:
        raise ValueError("products of FP8 need compute capability 9.0 or newer")
    if not (weight.stride(-1) == scales.stride(-1) == 1 and codes.is_contiguous()):
        raise ValueError("FP8 operands must lie row by row")
    if len(row_scales) > 1 and row_scales.stride(0) != 1:
        raise ValueError("the scales of a block of K must be contiguous")
    if weight.dim() == 3 and weight.stride(0) != weight.shape[1] * weight.stride(1):
        raise ValueError("the weights of one expert must follow those of the one before it")
    if codes.shape[1] % 16 or weight.stride(-2) % 16 or (codes.data_ptr() | weight.data_ptr()) % 16:
        raise ValueError(f"FP8 rows of {codes.shape[1]}: they must be multiples of 16 bytes")
