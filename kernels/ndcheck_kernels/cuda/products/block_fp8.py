"""FP8 weights in blocks of 128 x 128 times quantised rows, alone and in groups (experts).

Computes: sum over blocks b of K of p[b] * (s[b] * t[b]), plus an addend, as `ops.block_fp8` says.
Reduction order: p[b] is accumulated by the tensor cores in ascending k from zero, 32 columns an
    instruction; blocks in ascending order from 0, one fused multiply-add each; the addend last; one
    rounding at the end.
Depends on: K, dtype, architecture. Not on N or M, the row's position or its neighbours: tiles and
    schedule are held to one bit class as in `matmul`. Nothing is cut into K-groups.
Dtypes: float8_e4m3fn codes, float32 scales; result and addend bfloat16, float16 or float32.
Not claimed: devices older than compute capability 9.0, K that is no multiple of 16, rows beyond
    the last group, gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import PROVEN
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.cuda.products.grouped_matmul import _find_rows
from ndcheck_kernels.cuda.products.matmul_kernels import _prefetch
from ndcheck_kernels.cuda.products.tiles import accumulate, offsets, zeros
from ndcheck_kernels.ops.block_fp8 import BLOCK

FIRST_CAPABILITY = 90


@dataclass(frozen=True, slots=True)
class BlockFp8Config:
    """Schedule of one product; a step of K is a block of scales."""

    block_m: int
    block_n: int
    """At most 128, and a divisor of it: a tile has one column of the weights' blocks."""
    warps: int
    stages: int
    swap: bool = False
    """As in `MatmulConfig`: one operand has at least 64 rows, so that all tiles use wgmma."""


_ONE_FOR_ALL = BlockFp8Config(64, 64, 4, 4)
_Table = tuple[tuple[int, BlockFp8Config], ...]  # up to which M a configuration serves
_ANY = 1 << 62

# A wide N fills the chip with tiles of 64 columns; a narrow one needs tiles of 32.
_WIDE: _Table = (
    (16, BlockFp8Config(16, 64, 4, 10, swap=True)),
    (32, BlockFp8Config(32, 64, 4, 8, swap=True)),
    (64, BlockFp8Config(64, 64, 4, 6, swap=True)),
    (128, BlockFp8Config(128, 64, 4, 4, swap=True)),
    (_ANY, BlockFp8Config(128, 128, 8, 3)),
)
_NARROW: _Table = (
    (64, BlockFp8Config(64, 32, 4, 8)),
    (128, BlockFp8Config(64, 64, 4, 6, swap=True)),
    (512, BlockFp8Config(64, 128, 4, 4)),
    (_ANY, BlockFp8Config(128, 128, 8, 3)),
)
_FEWEST_WIDE = 8192
"""Output features from which 64 columns a tile make a wave."""

# Up to which mean number of rows in a group.
_GROUPED: _Table = (
    (16, BlockFp8Config(16, 64, 4, 10, swap=True)),
    (32, BlockFp8Config(32, 64, 4, 8, swap=True)),
    (64, BlockFp8Config(64, 64, 4, 6, swap=True)),
    (_ANY, BlockFp8Config(128, 128, 8, 3)),
)


def product_config(m: int, n: int, capability: int) -> BlockFp8Config:
    if capability not in PROVEN:
        return _ONE_FOR_ALL
    table = _WIDE if n >= _FEWEST_WIDE else _NARROW
    return next(config for most, config in table if m <= most)


def grouped_config(rows: int, groups: int, capability: int) -> BlockFp8Config:
    if capability not in PROVEN:
        return _ONE_FOR_ALL
    return next(config for mean, config in _GROUPED if rows <= mean * groups)


def selectable_configs(capability: int) -> tuple[BlockFp8Config, ...]:
    """Every configuration that some shape can select: what a proof must cover."""
    if capability not in PROVEN:
        return (_ONE_FOR_ALL,)
    tables = (*_WIDE, *_NARROW, *_GROUPED)
    return tuple(dict.fromkeys(config for _, config in tables))


@triton.jit
def _sum_blocks(
    x_desc, w_desc, s_ptrs, t_ptr, first_m, first_w, K, mask_m, stride_sb,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """s_ptrs: a scale for each row of the tile, in the accumulator's shape; t_ptr: the weights'.

    Scales are read one block ahead: unlike the operands, no pipeline hides how long they take.
    """
    acc = zeros(BLOCK_M, BLOCK_N, SWAP)
    s = tl.load(s_ptrs, mask_m, other=0.0)
    t = tl.load(t_ptr)
    for k in range(0, K, 128):
        scale = s * t
        following = tl.minimum(k // 128 + 1, (K - 1) // 128)
        s = tl.load(s_ptrs + following.to(tl.int64) * stride_sb, mask_m, other=0.0)
        t = tl.load(t_ptr + following)
        x = x_desc.load([first_m, k])  # [BLOCK_M, 128]
        w = w_desc.load([first_w, k])  # [BLOCK_N, 128]
        part = accumulate(x, w, zeros(BLOCK_M, BLOCK_N, SWAP), SWAP)
        acc = tl.fma(part, tl.broadcast_to(scale, acc.shape), acc)
    return acc


@triton.jit(do_not_specialize=["M", "stride_sb"])
def _block_fp8_kernel(
    x_desc, w_desc, w_ptr, s_ptr, t_ptr, c_ptr, y_ptr, M, N, K, stride_wn, stride_sb, stride_tn,
    stride_cm, stride_cn, stride_ym, HAS_C: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(M, BLOCK_M)
    first_m = (tl.program_id(0) % num_m) * BLOCK_M
    first_n = (tl.program_id(0) // num_m) * BLOCK_N
    if PDL:
        gdc_launch_dependents()
        if PREFETCH:
            _prefetch(w_ptr, first_n, 0, N, K, stride_wn, BLOCK_N, PREFETCH)
        gdc_wait()
    offs_m, offs_n = offsets(first_m, first_n, BLOCK_M, BLOCK_N, SWAP)
    acc = _sum_blocks(
        x_desc, w_desc, s_ptr + offs_m, t_ptr + (first_n // 128).to(tl.int64) * stride_tn, first_m,
        first_n, K, offs_m < M, stride_sb, BLOCK_M, BLOCK_N, SWAP,
    )  # fmt: skip
    mask = (offs_m < M) & (offs_n < N)
    if HAS_C:
        c = tl.load(c_ptr + offs_m * stride_cm + offs_n * stride_cn, mask, other=0.0)
        acc += c.to(tl.float32)
    tl.store(y_ptr + offs_m * stride_ym + offs_n, acc.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["stride_sb"])
def _grouped_block_fp8_kernel(
    x_desc, w_desc, s_ptr, t_ptr, y_ptr, ends_ptr, E, N, K, stride_sb, stride_te, stride_tn,
    stride_ym, E_BLOCK: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile may read rows and weights of the next group, which it drops."""
    follow(PDL)
    num_n = tl.cdiv(N, BLOCK_N)
    group, first_m, end = _find_rows(ends_ptr, tl.program_id(0) // num_n, E, E_BLOCK, BLOCK_M)
    if group < E:
        first_n = (tl.program_id(0) % num_n) * BLOCK_N
        offs_m, offs_n = offsets(first_m, first_n, BLOCK_M, BLOCK_N, SWAP)
        t_block = group.to(tl.int64) * stride_te + (first_n // 128) * stride_tn
        acc = _sum_blocks(
            x_desc, w_desc, s_ptr + offs_m, t_ptr + t_block, first_m, group * N + first_n, K,
            offs_m < end, stride_sb, BLOCK_M, BLOCK_N, SWAP,
        )  # fmt: skip
        mask = (offs_m < end) & (offs_n < N)
        tl.store(y_ptr + offs_m * stride_ym + offs_n, acc.to(y_ptr.dtype.element_ty), mask)


def block_fp8_matmul(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    addend: torch.Tensor | None = None, *, dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """codes [M, K], row_scales [M, K / 128] of stride (1, any), weight [N, K], scales
    [N / 128, K / 128], addend [N] or [M, N] -> [M, N].
    """
    config = product_config(len(codes), len(weight), device.capability(codes.device))
    return _launch(codes, row_scales, weight, scales, addend, dtype, config)


def _launch(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    addend: torch.Tensor | None, dtype: torch.dtype, config: BlockFp8Config,
) -> torch.Tensor:  # fmt: skip
    (m, k), n = codes.shape, weight.shape[0]
    _require(codes, row_scales, weight, scales)
    y = torch.empty((m, n), dtype=dtype, device=codes.device)
    if y.numel() == 0:
        return y
    c = y if addend is None else addend.expand(m, n)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    _block_fp8_kernel[(tiles,)](
        TensorDescriptor.from_tensor(codes, [config.block_m, BLOCK]),
        TensorDescriptor.from_tensor(weight, [config.block_n, BLOCK]),
        weight, row_scales, scales, c, y, m, n, k, weight.stride(0), row_scales.stride(1),
        scales.stride(0),
        *c.stride(), y.stride(0), HAS_C=addend is not None, SWAP=config.swap,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, PREFETCH=1024 if m <= 64 else 0,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False, **pdl(y.device),
    )  # fmt: skip
    return y


def grouped_block_fp8_matmul(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    ends: torch.Tensor, *, dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """codes [P, K] in order of groups, weight [E, N, K], scales [E, N / 128, K / 128], ends [E]
    int32 -> [P, N].
    """
    config = grouped_config(len(codes), len(weight), device.capability(codes.device))
    return _launch_grouped(codes, row_scales, weight, scales, ends, dtype, config)


def _launch_grouped(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    ends: torch.Tensor, dtype: torch.dtype, config: BlockFp8Config,
) -> torch.Tensor:  # fmt: skip
    (m, k), (e, n, _) = codes.shape, weight.shape
    _require(codes, row_scales, weight, scales)
    y = torch.empty((m, n), dtype=dtype, device=codes.device)
    if y.numel() == 0:
        return y
    # A group adds at most one tile that is not full.
    tiles = (min(e, m) + m // config.block_m) * triton.cdiv(n, config.block_n)
    _grouped_block_fp8_kernel[(tiles,)](
        TensorDescriptor.from_tensor(codes, [config.block_m, BLOCK]),
        TensorDescriptor.from_tensor(
            weight.as_strided((e * n, k), (weight.stride(1), 1)), [config.block_n, BLOCK]
        ),
        row_scales, scales, y, ends.to(torch.int32).contiguous(), e, n, k, row_scales.stride(1),
        scales.stride(0), scales.stride(1), y.stride(0), E_BLOCK=triton.next_power_of_2(e),
        SWAP=config.swap, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.warps,
        num_stages=config.stages, enable_fp_fusion=False, **pdl(y.device),
    )  # fmt: skip
    return y


def _require(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
) -> None:
    """Raises ValueError for what TMA cannot read, or the device cannot multiply."""
    require_readable(codes, weight)
    if scales.stride(-1) != 1:
        raise ValueError("FP8 operands must lie row by row")
    if len(row_scales) > 1 and row_scales.stride(0) != 1:
        raise ValueError("the scales of a block of K must be contiguous")


def require_readable(codes: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises ValueError for codes that TMA cannot read, or the device cannot multiply."""
    if device.capability(codes.device) < FIRST_CAPABILITY:
        raise ValueError("products of FP8 need compute capability 9.0 or newer")
    if not (weight.stride(-1) == 1 and codes.is_contiguous()):
        raise ValueError("FP8 operands must lie row by row")
    if weight.dim() == 3 and weight.stride(0) != weight.shape[1] * weight.stride(1):
        raise ValueError("the weights of one expert must follow those of the one before it")
    if codes.shape[1] % 16 or weight.stride(-2) % 16 or (codes.data_ptr() | weight.data_ptr()) % 16:
        raise ValueError(f"FP8 rows of {codes.shape[1]}: they must be multiples of 16 bytes")
