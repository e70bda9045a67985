"""Products with weights of 4 and 8 bits: dequantised in registers, or once before the product.

Computes: x @ w.T + addend with w = (code - zero) * scale in x's dtype, as `ops.weight_only` says.
Reduction order: that of `matmul` at the same (N, K): its K-groups, and inside a group ascending k.
    Few rows are multiplied while the weights are unpacked, in tiles that are held to `matmul`'s bit
    class; for many, and for what such a tile cannot read, the weight is unpacked as a whole and
    `matmul` has it.
Depends on: what `matmul` depends on.
Dtypes: x, addend and result bfloat16, float16 or float32; codes uint8, zeros int16, scales any.
Not claimed: what `matmul` does not; gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import PROVEN, chunk_length, k_groups
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.cuda.products.matmul import _fits_tma, matmul
from ndcheck_kernels.cuda.products.matmul_kernels import _prefetch
from ndcheck_kernels.cuda.products.pairs import (
    BF16_MAGIC,
    BF16_PAIRS,
    F16_MAGIC,
    F16_PAIRS,
    REGISTERS,
)
from ndcheck_kernels.cuda.products.tiles import accumulate, offsets, zeros
from ndcheck_kernels.ops.weight_only import Packed

_LONGEST_BLOCK = 256
"""Of columns, in any configuration."""


@dataclass(frozen=True, slots=True)
class WeightOnlyConfig:
    """Schedule of one product whose tiles unpack their weights, which are the first operand."""

    block_m: int
    block_n: int
    """64 at least: below, the dot is no wgmma, and takes its columns in another order."""
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class FewRowsConfig:
    """Schedule of one product by `weight_only_few`."""

    block_m: int
    per_warp: int
    """Output features: 8 or 16."""
    block_k: int
    warps: int
    stages: int


Config = WeightOnlyConfig | FewRowsConfig
_Table = tuple[tuple[int, Config], ...]  # up to which M a configuration serves

_CONFIGS: tuple[tuple[int, WeightOnlyConfig], ...] = (
    (16, WeightOnlyConfig(16, 64, 256, 4, 4)),
    (32, WeightOnlyConfig(32, 64, 256, 4, 4)),
    (64, WeightOnlyConfig(64, 64, 128, 4, 5)),
    (128, WeightOnlyConfig(128, 64, 128, 4, 4)),
    (256, WeightOnlyConfig(128, 128, 128, 8, 4)),
)
"""Beyond the last, unpacking the weight once costs less than unpacking it for each tile of rows."""

FEW_ROWS = FewRowsConfig(16, 16, 128, 4, 8)

_MEASURED_FORM = (4, 128)  # bits, and columns of a scale
# What was fastest on an H200 for weights of that form, by (N, K), in results/weight_only.
_MEASURED: dict[tuple[int, int], _Table] = {
    (6144, 4096): (
        (16, WeightOnlyConfig(16, 64, 256, 4, 8)),
        (32, WeightOnlyConfig(32, 64, 256, 4, 6)),
        (64, WeightOnlyConfig(64, 64, 256, 4, 4)),
        (128, WeightOnlyConfig(64, 64, 256, 4, 3)),
        (256, WeightOnlyConfig(128, 64, 128, 4, 3)),
        (512, WeightOnlyConfig(128, 128, 128, 8, 3)),
    ),
    (4096, 4096): (
        (16, FEW_ROWS),
        (32, WeightOnlyConfig(32, 64, 256, 4, 6)),
        (64, WeightOnlyConfig(32, 64, 256, 4, 6)),
        (128, WeightOnlyConfig(64, 64, 256, 4, 4)),
        (256, WeightOnlyConfig(128, 64, 128, 4, 4)),
        (512, WeightOnlyConfig(128, 64, 128, 4, 3)),
        (1024, WeightOnlyConfig(128, 128, 128, 8, 3)),
    ),
    (24576, 4096): (
        (16, FEW_ROWS),
        (32, WeightOnlyConfig(32, 64, 256, 4, 3)),
        (64, WeightOnlyConfig(64, 64, 128, 4, 3)),
        (128, WeightOnlyConfig(128, 128, 128, 8, 3)),
        (256, WeightOnlyConfig(128, 64, 128, 4, 3)),
        (512, WeightOnlyConfig(128, 128, 128, 8, 3)),
        (1024, WeightOnlyConfig(128, 128, 128, 8, 3)),
    ),
    (4096, 12288): (
        (16, FEW_ROWS),
        (32, WeightOnlyConfig(32, 64, 256, 4, 3)),
        (64, WeightOnlyConfig(32, 64, 256, 4, 6)),
        (128, WeightOnlyConfig(64, 64, 256, 4, 4)),
        (256, WeightOnlyConfig(128, 64, 128, 4, 4)),
        (512, WeightOnlyConfig(128, 64, 128, 4, 3)),
        (1024, WeightOnlyConfig(128, 128, 128, 8, 3)),
    ),
}


def product_config(x: torch.Tensor, packed: Packed) -> Config | None:
    """None where the weight is to be unpacked before the product."""
    table: _Table = _CONFIGS
    if (packed.bits, packed.group_size) == _MEASURED_FORM:
        table = _MEASURED.get((len(packed.codes), packed.columns), _CONFIGS)
    config = _choose(table, len(x))
    return config if config is None or is_for(config, x, packed) else _choose(_CONFIGS, len(x))


def is_for(config: Config, x: torch.Tensor, packed: Packed) -> bool:
    """Whether a configuration can multiply these, given that a tile `can_fuse` them."""
    return isinstance(config, WeightOnlyConfig) or (
        device.has_hopper_kernels(x.device)
        and packed.bits == 4
        and packed.group_size % config.block_k == 0
        and packed.zeros is None
        and packed.scales.dtype == x.dtype == torch.bfloat16
    )


def _choose(table: _Table, m: int) -> Config | None:
    return next((config for most, config in table if m <= most), None)


def selectable_configs(bits: int, group_size: int) -> tuple[Config, ...]:
    """Every configuration that some product of this form can select: what a proof must cover."""
    is_measured = (bits, group_size) == _MEASURED_FORM
    tables = (_CONFIGS, *(_MEASURED.values() if is_measured else ()))
    return tuple(dict.fromkeys(config for table in tables for _, config in table))


_BF16_PAIRS, _F16_PAIRS = tl.constexpr(BF16_PAIRS), tl.constexpr(F16_PAIRS)
_BF16_MAGIC, _F16_MAGIC = tl.constexpr(BF16_MAGIC), tl.constexpr(F16_MAGIC)
_REGISTERS = tl.constexpr(REGISTERS)


@triton.jit
def _weights_of_pairs(words, zero, scale, HAS_ZEROS: tl.constexpr, DTYPE: tl.constexpr):
    """The weights of words of 4-bit codes, with scales of their dtype, two at a time."""
    N: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    ASM: tl.constexpr = _BF16_PAIRS if tl.bfloat16 == DTYPE else _F16_PAIRS
    MAGIC: tl.constexpr = _BF16_MAGIC if tl.bfloat16 == DTYPE else _F16_MAGIC
    scale = scale.to(tl.uint16, bitcast=True).to(tl.int32) * 0x10001
    if HAS_ZEROS:
        zero = _by_word(zero.to(tl.int32) * 0x10001 + MAGIC, WORDS)
    else:
        zero = tl.full((N, WORDS), 0x00080008 + MAGIC, tl.int32)
    p = tl.inline_asm_elementwise(
        ASM, _REGISTERS, [words, zero, _by_word(scale, WORDS)],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True, pack=2,
    )  # fmt: skip
    low = tl.join(tl.join(p[0], p[1]), tl.join(p[2], p[3]))
    high = tl.join(tl.join(p[4], p[5]), tl.join(p[6], p[7]))
    w = tl.reshape(tl.join(low, high), (N, WORDS // 8, 8, 2, 2, 2))
    w = tl.reshape(tl.permute(w, (0, 1, 5, 4, 3, 2)), (N, 8 * WORDS))
    return w.to(DTYPE, bitcast=True)


@triton.jit
def _by_word(t, WORDS: tl.constexpr):
    """[N, G] -> [N, WORDS], the words of G groups of columns."""
    N: tl.constexpr = t.shape[0]
    G: tl.constexpr = t.shape[1]
    if 8 * G > WORDS:  # Every other word is of the next group.
        t = tl.broadcast_to(tl.reshape(t, (N, G // 2, 1, 2)), (N, G // 2, 4, 2))
    else:
        t = tl.broadcast_to(t[:, :, None], (N, G, WORDS // G))
    return tl.reshape(t, (N, WORDS))


@triton.jit
def _code(words, PLACE: tl.constexpr, BITS: tl.constexpr):
    """2**23 + code as a float32: exact, and cheaper than a conversion."""
    MASK: tl.constexpr = (1 << BITS) - 1
    return ((words >> (PLACE * BITS)) & MASK) | 0x4B000000


@triton.jit
def _codes(words, BITS: tl.constexpr):
    """Words [N, W] -> [N, 32 / BITS * W] as `_code` has them, in order of columns."""
    N: tl.constexpr = words.shape[0]
    RUNS: tl.constexpr = words.shape[1] // 8
    low = tl.join(_code(words, 0, BITS), _code(words, 1, BITS))
    high = tl.join(_code(words, 2, BITS), _code(words, 3, BITS))
    t = tl.join(low, high)
    if BITS == 4:
        low = tl.join(_code(words, 4, BITS), _code(words, 5, BITS))
        high = tl.join(_code(words, 6, BITS), _code(words, 7, BITS))
        t = tl.reshape(tl.join(t, tl.join(low, high)), (N, RUNS, 4, 2, 2, 2, 2))
        t = tl.permute(t, (0, 1, 3, 5, 4, 2, 6))
    else:
        t = tl.permute(tl.reshape(t, (N, RUNS, 4, 2, 2, 2)), (0, 1, 3, 4, 2, 5))
    return tl.reshape(t, (N, RUNS * (256 // BITS))).to(tl.float32, bitcast=True)


@triton.jit
def _by_column(t, K: tl.constexpr):
    """[N, G] -> [N, K] as float32, K / G columns a group."""
    N: tl.constexpr = t.shape[0]
    G: tl.constexpr = t.shape[1]
    t = tl.broadcast_to(t.to(tl.float32)[:, :, None], (N, G, K // G))
    return tl.reshape(t, (N, K))


@triton.jit(do_not_specialize=["M"])
def _weight_only_kernel(
    x_desc, codes_desc, s_desc, z_desc, codes_ptr, c_ptr, y_ptr, M, N, K, chunk, stride_n,
    stride_cm, stride_cn, stride_ym, GROUPS: tl.constexpr, HAS_C: tl.constexpr,
    HAS_ZEROS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GROUP: columns of a scale; GROUPS: of K, as `matmul` cuts it."""
    num_m = tl.cdiv(M, BLOCK_M)
    first_m = (tl.program_id(0) % num_m) * BLOCK_M
    first_n = (tl.program_id(0) // num_m) * BLOCK_N
    if PDL:
        gdc_launch_dependents()
        if PREFETCH:
            _prefetch(codes_ptr, first_n, 0, N, K * BITS // 8, stride_n, BLOCK_N, PREFETCH)
        gdc_wait()
    DTYPE: tl.constexpr = x_desc.dtype
    tot = zeros(BLOCK_M, BLOCK_N, True)
    for g in tl.static_range(GROUPS):
        acc = zeros(BLOCK_M, BLOCK_N, True)
        for k in range(g * chunk, tl.minimum(K, (g + 1) * chunk), BLOCK_K):
            words = codes_desc.load([first_n, k * BITS // 32])
            scale = tl.trans(s_desc.load([k // GROUP, first_n]))
            zero = 8388608.0 + (1 << (BITS - 1))
            if HAS_ZEROS:
                zero = tl.trans(z_desc.load([k // GROUP, first_n]))
            if BITS == 4 and s_desc.dtype == DTYPE:
                w = _weights_of_pairs(words, zero, scale, HAS_ZEROS, DTYPE)
            else:
                if HAS_ZEROS:
                    zero = 8388608.0 + _by_column(zero, BLOCK_K)
                w = ((_codes(words, BITS) - zero) * _by_column(scale, BLOCK_K)).to(DTYPE)
            acc = accumulate(x_desc.load([first_m, k]), w, acc, True)
        tot = acc if GROUPS == 1 else tot + acc
    offs_m, offs_n = offsets(first_m, first_n, BLOCK_M, BLOCK_N, True)
    mask = (offs_m < M) & (offs_n < N)
    if HAS_C:
        c = tl.load(c_ptr + offs_m * stride_cm + offs_n * stride_cn, mask, other=0.0)
        tot += c.to(tl.float32)
    tl.store(y_ptr + offs_m * stride_ym + offs_n, tot.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _unpack_kernel(
    words_ptr, s_ptr, z_ptr, group_ptr, y_ptr, N, K, group_size, stride_n, stride_s, stride_z,
    HAS_ZEROS: tl.constexpr, HAS_GROUPS: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The weight of BLOCK_N rows and BLOCK_K columns."""
    follow(PDL)
    WORDS: tl.constexpr = BLOCK_K * BITS // 32
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    offs_k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    offs_w = (tl.program_id(1) * WORDS + tl.arange(0, WORDS))[None, :]
    mask = (offs_n < N) & (offs_k < K)
    words = tl.load(
        words_ptr + offs_n * stride_n + offs_w, (offs_n < N) & (offs_w < stride_n), other=0
    )
    if HAS_GROUPS:
        group = tl.load(group_ptr + offs_k, offs_k < K, other=0).to(tl.int64)
    else:
        group = (offs_k // group_size).to(tl.int64)
    scale = tl.load(s_ptr + group * stride_s + offs_n, mask, other=0.0).to(tl.float32)
    zero = 8388608.0 + (1 << (BITS - 1))
    if HAS_ZEROS:
        zero = tl.load(z_ptr + group * stride_z + offs_n, mask, other=0).to(tl.float32)
        zero = 8388608.0 + zero
    w = ((_codes(words, BITS) - zero) * scale).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_n * K + offs_k, w, mask)


def weight_only_matmul(
    x: torch.Tensor, packed: Packed, addend: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, K], and [M, N] or [N] to be added -> [M, N]."""
    if not packed.scales.stride(-1) == packed.codes.stride(-1) == 1:
        raise ValueError("codes must lie row by row, and scales group by group")
    if can_fuse(x, packed):
        config = product_config(x, packed)
        if config is not None:
            return _launch(x, packed, addend, config)
    return matmul(x, unpacked(packed, x.dtype).t(), addend)


def can_fuse(x: torch.Tensor, packed: Packed) -> bool:
    """Whether a tile of the product can unpack its weights by itself."""
    k, size = packed.columns, packed.group_size if packed.group_of is None else 0
    return (
        device.capability(x.device) in PROVEN
        and x.element_size() == 2
        and k % _LONGEST_BLOCK == 0
        and (size in (32, 64, 128) or (size > 0 and size % _LONGEST_BLOCK == 0))
        and _fits_tma(x)
        and all(map(_fits_tma, (packed.codes, packed.scales)))
        and (packed.zeros is None or _fits_tma(packed.zeros))
    )


def _launch(
    x: torch.Tensor, packed: Packed, addend: torch.Tensor | None, config: Config
) -> torch.Tensor:
    (m, k), n = x.shape, len(packed.codes)
    if addend is not None and addend.dtype != x.dtype:
        raise TypeError(f"an addend of {addend.dtype} to a product of {x.dtype}")
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    c = y if addend is None else addend.expand(m, n)
    if isinstance(config, FewRowsConfig):
        from ndcheck_kernels.cuda.products import weight_only_few

        weight_only_few.launch(x, packed, None if addend is None else c, y, config)
        return y
    words = packed.codes.view(torch.int32)
    by_group = [max(1, config.block_k // packed.group_size), config.block_n]
    middle = packed.scales if packed.zeros is None else packed.zeros  # Stands in for none.
    groups = k_groups(n, k, x.element_size(), device.capability(x.device))
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    _weight_only_kernel[(tiles,)](
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(words, [config.block_n, config.block_k * packed.bits // 32]),
        TensorDescriptor.from_tensor(packed.scales, by_group),
        TensorDescriptor.from_tensor(middle, by_group),
        packed.codes, c, y, m, n, k, chunk_length(k, groups), packed.codes.stride(0), *c.stride(),
        y.stride(0), GROUPS=groups, HAS_C=addend is not None, HAS_ZEROS=packed.zeros is not None,
        BITS=packed.bits, GROUP=packed.group_size, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, PREFETCH=512 if m <= 64 else 0, num_warps=config.warps,
        num_stages=config.stages, **pdl(y.device),
    )  # fmt: skip
    return y


def unpacked(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K], with the bits of `ops.weight_only.dequantise`."""
    n, k = len(packed.codes), packed.columns
    y = torch.empty((n, k), dtype=dtype, device=packed.codes.device)
    if y.numel() == 0:
        return y
    middle = packed.scales if packed.zeros is None else packed.zeros
    words = packed.codes.view(torch.int32)
    group_of = words if packed.group_of is None else packed.group_of
    block_n, block_k = 32, 128
    _unpack_kernel[(triton.cdiv(n, block_n), triton.cdiv(k, block_k))](
        words, packed.scales, middle, group_of, y, n, k, packed.group_size,
        words.stride(0), packed.scales.stride(0), middle.stride(0),
        HAS_ZEROS=packed.zeros is not None, HAS_GROUPS=packed.group_of is not None,
        BITS=packed.bits, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, **pdl(y.device),
    )  # fmt: skip
    return y


__all__ = ["can_fuse", "product_config", "unpacked", "weight_only_matmul"]
