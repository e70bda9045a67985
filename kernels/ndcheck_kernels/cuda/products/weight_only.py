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
from ndcheck_kernels.cuda.products.tiles import accumulate, offsets, zeros
from ndcheck_kernels.ops.weight_only import HALF, RUN, Packed


@dataclass(frozen=True, slots=True)
class WeightOnlyConfig:
    """Schedule of one product; a step of K is a run of codes. Weights are the first operand."""

    block_m: int
    block_n: int
    warps: int
    stages: int


_ANY = 1 << 62
_Table = tuple[tuple[int, WeightOnlyConfig], ...]  # up to which M a configuration serves

_CONFIGS: _Table = (
    (16, WeightOnlyConfig(16, 64, 4, 4)),
    (32, WeightOnlyConfig(32, 64, 4, 4)),
    (64, WeightOnlyConfig(64, 64, 4, 3)),
    (128, WeightOnlyConfig(128, 64, 4, 2)),
)
"""Of 64 output features at least: below, the dot is no wgmma, and has other bits."""
MOST_ROWS = 128
"""Beyond these, unpacking the weight once costs less than unpacking it for each tile of rows."""


def product_config(m: int) -> WeightOnlyConfig:
    """Of up to MOST_ROWS rows."""
    return next(config for most, config in _CONFIGS if m <= most)


def selectable_configs() -> tuple[WeightOnlyConfig, ...]:
    """Every configuration that some number of rows can select: what a proof must cover."""
    return tuple(config for _, config in _CONFIGS)


@triton.jit
def _dequantise(codes, zero, scale, DTYPE: tl.constexpr):
    # 2**23 + code has the code as its last bits: exact, and cheaper than a conversion.
    wide = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    return ((wide - (8388608.0 + zero)) * scale).to(DTYPE)


@triton.jit
def _by_column(t, BLOCK_N: tl.constexpr, PER_HALF: tl.constexpr):
    """[PER_HALF, BLOCK_N] as float32, shaped to meet weights [BLOCK_N, 128]."""
    t = tl.trans(t).to(tl.float32)
    if PER_HALF > 1:
        t = tl.broadcast_to(t[:, :, None], (BLOCK_N, PER_HALF, 128 // PER_HALF))
        t = tl.reshape(t, (BLOCK_N, 128))
    return t


@triton.jit
def _half(
    codes, k, first_n, s_desc, z_desc, MIDDLE: tl.constexpr, HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The weights [BLOCK_N, 128] of codes that begin at column k."""
    PER_HALF: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
    group = k // GROUP
    scale = _by_column(s_desc.load([group, first_n]), BLOCK_N, PER_HALF)
    zero = 1.0 * MIDDLE
    if HAS_ZEROS:
        zero = _by_column(z_desc.load([group, first_n]), BLOCK_N, PER_HALF)
    return _dequantise(codes, zero, scale, DTYPE)


@triton.jit(do_not_specialize=["M"])
def _weight_only_kernel(
    x_desc, codes_desc, s_desc, z_desc, codes_ptr, c_ptr, y_ptr, M, N, K, chunk, stride_n,
    stride_cm, stride_cn, stride_ym, GROUPS: tl.constexpr, HAS_C: tl.constexpr,
    HAS_ZEROS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
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
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    tot = zeros(BLOCK_M, BLOCK_N, True)
    for g in tl.static_range(GROUPS):
        acc = zeros(BLOCK_M, BLOCK_N, True)
        for k in range(g * chunk, tl.minimum(K, (g + 1) * chunk), 256):
            if BITS == 4:
                both = codes_desc.load([first_n, k // 2])  # [BLOCK_N, 128]
                low = both & 15
                high = both >> 4
            else:
                low = codes_desc.load([first_n, k])
                high = codes_desc.load([first_n, k + 128])
            w = _half(
                low, k, first_n, s_desc, z_desc, MIDDLE, HAS_ZEROS, GROUP, BLOCK_N, DTYPE
            )  # fmt: skip
            acc = accumulate(x_desc.load([first_m, k]), w, acc, True)
            w = _half(
                high, k + 128, first_n, s_desc, z_desc, MIDDLE, HAS_ZEROS, GROUP, BLOCK_N, DTYPE
            )  # fmt: skip
            acc = accumulate(x_desc.load([first_m, k + 128]), w, acc, True)
        tot = acc if GROUPS == 1 else tot + acc
    offs_m, offs_n = offsets(first_m, first_n, BLOCK_M, BLOCK_N, True)
    mask = (offs_m < M) & (offs_n < N)
    if HAS_C:
        c = tl.load(c_ptr + offs_m * stride_cm + offs_n * stride_cn, mask, other=0.0)
        tot += c.to(tl.float32)
    tl.store(y_ptr + offs_m * stride_ym + offs_n, tot.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _unpack_kernel(
    codes_ptr, s_ptr, z_ptr, group_ptr, y_ptr, N, K, group_size, stride_n, stride_s, stride_z,
    HAS_ZEROS: tl.constexpr, HAS_GROUPS: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The weight of BLOCK_N rows and 128 columns, which one half of the bytes of a run holds."""
    follow(PDL)
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    first = tl.program_id(1) * 128
    offs_k = (first + tl.arange(0, 128))[None, :]
    mask = (offs_n < N) & (offs_k < K)
    if BITS == 4:
        place = first // 256 * 128 + tl.arange(0, 128)[None, :]
        codes = tl.load(codes_ptr + offs_n * stride_n + place, offs_n < N, other=0)
        codes = (codes >> (first // 128 % 2 * 4).to(tl.uint8)) & 15
    else:
        codes = tl.load(codes_ptr + offs_n * stride_n + offs_k, mask, other=0)
    if HAS_GROUPS:
        group = tl.load(group_ptr + offs_k, offs_k < K, other=0).to(tl.int64)
    else:
        group = (offs_k // group_size).to(tl.int64)
    scale = tl.load(s_ptr + group * stride_s + offs_n, mask, other=0.0).to(tl.float32)
    zero = tl.full((BLOCK_N, 128), 1 << (BITS - 1), tl.float32)
    if HAS_ZEROS:
        zero = tl.load(z_ptr + group * stride_z + offs_n, mask, other=0).to(tl.float32)
    w = _dequantise(codes, zero, scale, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_n * K + offs_k, w, mask)


def weight_only_matmul(
    x: torch.Tensor, packed: Packed, addend: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, K], and [M, N] or [N] to be added -> [M, N]."""
    if not packed.scales.stride(-1) == packed.codes.stride(-1) == 1:
        raise ValueError("codes must lie row by row, and scales group by group")
    if len(x) <= MOST_ROWS and can_fuse(x, packed):
        return _launch(x, packed, addend, product_config(len(x)))
    return matmul(x, unpacked(packed, x.dtype).t(), addend)


def can_fuse(x: torch.Tensor, packed: Packed) -> bool:
    """Whether a tile of the product can unpack its weights by itself."""
    k, size = packed.columns, packed.group_size if packed.group_of is None else 0
    return (
        device.capability(x.device) in PROVEN
        and x.element_size() == 2
        and k % RUN == 0
        and (size in (32, 64) or (size > 0 and size % HALF == 0))
        and _fits_tma(x)
        and all(map(_fits_tma, (packed.codes, packed.scales)))
        and (packed.zeros is None or _fits_tma(packed.zeros))
    )


def _launch(
    x: torch.Tensor, packed: Packed, addend: torch.Tensor | None, config: WeightOnlyConfig
) -> torch.Tensor:
    (m, k), n = x.shape, len(packed.codes)
    if addend is not None and addend.dtype != x.dtype:
        raise TypeError(f"an addend of {addend.dtype} to a product of {x.dtype}")
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    c = y if addend is None else addend.expand(m, n)
    by_group = [max(1, HALF // packed.group_size), config.block_n]
    middle = packed.scales if packed.zeros is None else packed.zeros  # Stands in for none.
    groups = k_groups(n, k, x.element_size(), device.capability(x.device))
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    _weight_only_kernel[(tiles,)](
        TensorDescriptor.from_tensor(x, [config.block_m, HALF]),
        TensorDescriptor.from_tensor(packed.codes, [config.block_n, HALF]),
        TensorDescriptor.from_tensor(packed.scales, by_group),
        TensorDescriptor.from_tensor(middle, by_group),
        packed.codes, c, y, m, n, k, chunk_length(k, groups), packed.codes.stride(0), *c.stride(),
        y.stride(0), GROUPS=groups, HAS_C=addend is not None, HAS_ZEROS=packed.zeros is not None,
        BITS=packed.bits, GROUP=packed.group_size, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PREFETCH=512 if m <= 64 else 0, num_warps=config.warps, num_stages=config.stages,
        **pdl(y.device),
    )  # fmt: skip
    return y


def unpacked(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K], with the bits of `ops.weight_only.dequantise`."""
    n, k = len(packed.codes), packed.columns
    y = torch.empty((n, k), dtype=dtype, device=packed.codes.device)
    if y.numel() == 0:
        return y
    middle = packed.scales if packed.zeros is None else packed.zeros
    group_of = packed.codes if packed.group_of is None else packed.group_of
    block_n = 32
    _unpack_kernel[(triton.cdiv(n, block_n), triton.cdiv(k, HALF))](
        packed.codes, packed.scales, middle, group_of, y, n, k, packed.group_size,
        packed.codes.stride(0), packed.scales.stride(0), middle.stride(0),
        HAS_ZEROS=packed.zeros is not None, HAS_GROUPS=packed.group_of is not None,
        BITS=packed.bits, BLOCK_N=block_n, num_warps=4, **pdl(y.device),
    )  # fmt: skip
    return y


__all__ = ["MOST_ROWS", "can_fuse", "product_config", "unpacked", "weight_only_matmul"]
