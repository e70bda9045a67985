"""Rows as e4m3 codes with a scale for every 128 columns: as they are, after RMSNorm or a gate.

Or with one scale for the whole row.

Computes: what `ops.block_fp8` or, of one scale, `ops.row_fp8` says of a row; the quotients are IEEE
    divisions. After RMSNorm or silu(gate) * up, of the row rounded to its dtype, as `rms_norm` and
    `silu_mul` do.
Reduction order: a maximum has none; RMSNorm's is one `tl.sum` over a tile of `row_tile(K)`, which
    on a GPU the compiler lays out for the codes, so that its order need not be that of `rms_norm`.
Depends on: the row, dtype, architecture, Triton version.
Dtypes: bfloat16, float16, float32 to float8_e4m3fn and float32.
Not claimed: gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import row_tile
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.cuda.rows.silu_mul import silu_times
from ndcheck_kernels.ops.block_fp8 import BLOCK
from ndcheck_kernels.ops.row_fp8 import UNBOUNDED

Quantised = tuple[torch.Tensor, torch.Tensor]
"""Codes [M, K] and scales [M, K / 128], one column of scales after the other in memory; or [M]."""

_BLOCKS = 8
"""Of 128 columns, in one program."""
_FEW_ROWS = 16
"""Of so many and one scale, several programs share a row, each of which finds its maximum."""


@dataclass(frozen=True, slots=True)
class OneScale:
    """How rows get one scale each."""

    given: torch.Tensor | None = None
    """[M] or [1] float32, of a calibration; None: it is made of the row's largest magnitude."""
    bound: float = UNBOUNDED
    """The largest magnitude from which it is made."""


@triton.jit
def divide(x, divisor):
    """x [..., N] by divisors [..., 1] of 2**-126 or more, which may be infinite: IEEE quotients.

    But for those below 2**-11, which all round to the code 0, and above 512, which may be infinite.
    The hardware's division branches, one element after the other. Here all share a reciprocal, and
    where that is rounded correctly and a quotient is off by less than a unit in the last place, one
    more correction rounds it correctly (Markstein, 1990).
    """
    factor = tl.where(divisor < 1.0, 2.0**64, 1.0)  # So that no remainder underflows.
    d = divisor * factor
    reciprocal = tl.broadcast_to(tl.div_rn(tl.full(d.shape, 1.0, tl.float32), d), x.shape)
    minus_d = tl.broadcast_to(-d, x.shape)
    x = x * tl.broadcast_to(factor, x.shape)
    rough = x * reciprocal
    near = tl.fma(tl.fma(minus_d, rough, x), reciprocal, rough)
    quotient = tl.fma(tl.fma(minus_d, near, x), reciprocal, near)
    # A correction loses the sign of zero, and makes NaN of infinity.
    return tl.where((rough == 0.0) | (tl.abs(rough) >= 512.0), rough, quotient)


@triton.jit
def quantise_blocks(x):
    """[..., 128] float32 -> quotients in the range of e4m3, and scales [..., 1]."""
    largest = tl.max(tl.abs(x), axis=-1, keep_dims=True)
    scale = tl.maximum(tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32)), 2.0**-126)
    return divide(x, scale), scale


@triton.jit
def _scale_of_rows(x, given_ptrs, mask_m, bound, IS_GIVEN: tl.constexpr):
    """x [ROWS, COLUMNS] float32 -> [ROWS, 1]."""
    if IS_GIVEN:
        scale = tl.load(given_ptrs, mask_m, other=0.0)
    else:
        largest = tl.minimum(tl.max(tl.abs(x), axis=1, keep_dims=True), bound)
        scale = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    return tl.maximum(scale, 2.0**-126)


@triton.jit
def _bounded(x, scale):
    """x [ROWS, COLUMNS] by a scale that may be too small for it."""
    return tl.clamp(divide(x, scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _read(x_ptr, up_ptr, offs_k, K, HAS_UP: tl.constexpr):
    """Of a row what is to be quantised, in float32."""
    mask = offs_k < K
    loaded = tl.load(x_ptr + offs_k, mask, other=0.0)
    x = loaded.to(tl.float32)
    if HAS_UP:
        up = tl.load(up_ptr + offs_k, mask, other=0.0)
        x = silu_times(loaded, up).to(loaded.dtype).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["stride_sb"])
def _quantise_kernel(
    x_ptr, up_ptr, place_ptr, codes_ptr, scales_ptr, K, stride_xm, stride_um, stride_sb,
    HAS_UP: tl.constexpr, HAS_PLACE: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    source = row
    if HAS_PLACE:
        source = tl.load(place_ptr + row).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    offs_k = block * 128 + tl.arange(0, 128)[None, :]  # [BLOCKS, 128]
    x = _read(x_ptr + source * stride_xm, up_ptr + source * stride_um, offs_k, K, HAS_UP)
    quotients, scale = quantise_blocks(x)
    codes_ptrs = codes_ptr + row * K + offs_k
    tl.store(codes_ptrs, quotients.to(codes_ptr.dtype.element_ty), offs_k < K)
    tl.store(scales_ptr + block * stride_sb + row, scale, block * 128 < K)


@triton.jit
def _quantise_whole_kernel(
    x_ptr, up_ptr, place_ptr, given_ptr, codes_ptr, scales_ptr, K, bound, stride_xm, stride_um,
    stride_given, HAS_UP: tl.constexpr, HAS_PLACE: tl.constexpr, IS_GIVEN: tl.constexpr,
    COLUMNS: tl.constexpr, OWN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program quantises OWN of a row's COLUMNS; the scale is that of all."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    source = row
    if HAS_PLACE:
        source = tl.load(place_ptr + row).to(tl.int64)
    x_ptr += source * stride_xm
    up_ptr += source * stride_um
    offs_k = tl.program_id(1) * OWN + tl.arange(0, OWN)[None, :]
    x = _read(x_ptr, up_ptr, offs_k, K, HAS_UP)  # [1, OWN]
    whole = x
    if OWN < COLUMNS and not IS_GIVEN:
        whole = _read(x_ptr, up_ptr, tl.arange(0, COLUMNS)[None, :], K, HAS_UP)
    offs_m = row + tl.arange(0, 1)[:, None]
    mask_m = offs_m < tl.num_programs(0)
    scale = _scale_of_rows(whole, given_ptr + offs_m * stride_given, mask_m, bound, IS_GIVEN)
    codes = _bounded(x, scale).to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + row * K + offs_k, codes, offs_k < K)
    tl.store(scales_ptr + offs_m, scale)  # The same from every program of the row.


@triton.jit(do_not_specialize=["M", "stride_sb"])
def _rms_norm_quantise_kernel(
    x_ptr, weight_ptr, given_ptr, codes_ptr, scales_ptr, M, K, stride_xm, stride_sb, stride_given,
    eps, bound, BY_BLOCK: tl.constexpr, IS_GIVEN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    offs_k = tl.arange(0, COLUMNS)[None, :]
    mask = (offs_m < M) & (offs_k < K)
    loaded = tl.load(x_ptr + offs_m * stride_xm + offs_k, mask, other=0.0)  # [ROWS, COLUMNS]
    weight = tl.load(
        weight_ptr + offs_k, offs_k < K, other=0.0
    )  # Not after the sum: it takes long.
    x = loaded.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / K + eps)
    y *= weight.to(tl.float32)
    y = y.to(loaded.dtype).to(tl.float32)
    if BY_BLOCK:
        quotients, scale = quantise_blocks(tl.reshape(y, (ROWS, COLUMNS // 128, 128)))
        block = tl.arange(0, COLUMNS // 128)[None, :]
        scale = tl.reshape(scale, (ROWS, COLUMNS // 128))
        tl.store(scales_ptr + block * stride_sb + offs_m, scale, (offs_m < M) & (block * 128 < K))
    else:
        given_ptrs = given_ptr + offs_m * stride_given
        scale = _scale_of_rows(y, given_ptrs, offs_m < M, bound, IS_GIVEN)
        quotients = _bounded(y, scale)
        tl.store(scales_ptr + offs_m, scale, offs_m < M)
    codes = tl.reshape(quotients, (ROWS, COLUMNS)).to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + offs_m * K + offs_k, codes, mask)


def quantise_rows(
    rows: torch.Tensor, place: torch.Tensor | None = None, *, one_scale: OneScale | None = None
) -> Quantised:
    """rows [M, K], or of them those at ``place`` [P], in blocks or with one scale each.

    Of one scale K is up to 65536.
    """
    device.require_float("quantise_rows", rows)
    return _launch(rows, None, place, one_scale)


def silu_mul_quantise(
    gate: torch.Tensor, up: torch.Tensor, *, one_scale: OneScale | None = None
) -> Quantised:
    """gate and up [M, K] may be the two halves of one projection: no copy is made."""
    device.require_float("silu_mul_quantise", gate, up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype} {tuple(gate.shape)}, up is unlike it")
    return _launch(gate, up, None, one_scale)


def rms_norm_quantise(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, one_scale: OneScale | None = None
) -> Quantised:
    """x [M, K], weight [K]; K up to 65536."""
    device.require_float("rms_norm_quantise", x, weight)
    rows, weight_row = device.aligned_rows(x), device.aligned_rows(weight)
    (m, k), tile, by_block = rows.shape, row_tile(rows.shape[1]), one_scale is None
    codes, scales = empty(m, k, x.device, by_block=by_block)
    columns = max(tile.block, BLOCK) if by_block else tile.block
    given, stride_given, bound = _given(one_scale, scales)
    if m:
        _rms_norm_quantise_kernel[(triton.cdiv(m, tile.rows),)](
            rows, weight_row, given, codes, scales, m, k, rows.stride(0),
            scales.stride(1) if by_block else 0, stride_given, eps, bound, BY_BLOCK=by_block,
            IS_GIVEN=given is not scales, ROWS=tile.rows, COLUMNS=columns, num_warps=tile.warps,
            enable_fp_fusion=True, **pdl(x.device),
        )  # fmt: skip
    return codes, scales


def _launch(
    x: torch.Tensor, up: torch.Tensor | None, place: torch.Tensor | None, one_scale: OneScale | None
) -> Quantised:
    x = x if x.stride(1) == 1 else x.contiguous()
    if up is not None and up.stride(1) != 1:
        up = up.contiguous()
    m, k = len(x) if place is None else len(place), x.shape[1]
    codes, scales = empty(m, k, x.device, by_block=one_scale is None)
    if codes.numel() == 0:
        return codes, scales
    read = (x, x if up is None else up, codes if place is None else place)
    strides = (x.stride(0), 0 if up is None else up.stride(0))
    shared = {"HAS_UP": up is not None, "HAS_PLACE": place is not None, **pdl(x.device)}
    if one_scale is None:
        _quantise_kernel[(m, triton.cdiv(k, _BLOCKS * BLOCK))](
            *read, codes, scales, k, *strides, scales.stride(1), BLOCKS=_BLOCKS, num_warps=4,
            enable_fp_fusion=True, **shared,
        )  # fmt: skip
        return codes, scales
    tile = row_tile(k)
    given, stride_given, bound = _given(one_scale, scales)
    own = min(tile.block, _BLOCKS * BLOCK) if m <= _FEW_ROWS else tile.block
    _quantise_whole_kernel[(m, triton.cdiv(k, own))](
        *read, given, codes, scales, k, bound, *strides, stride_given,
        IS_GIVEN=given is not scales, COLUMNS=tile.block, OWN=own, num_warps=tile.warps,
        enable_fp_fusion=True, **shared,
    )  # fmt: skip
    return codes, scales


def _given(one_scale: OneScale | None, scales: torch.Tensor) -> tuple[torch.Tensor, int, float]:
    """A pointer and its stride from row to row, ``scales`` in place of none, and the bound."""
    if one_scale is None or one_scale.given is None:
        return scales, 0, UNBOUNDED if one_scale is None else one_scale.bound
    given = one_scale.given.expand(len(scales))
    return given, given.stride(0), one_scale.bound


def empty(m: int, k: int, where: torch.device, *, by_block: bool = True) -> Quantised:
    codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=where)
    if not by_block:
        return codes, torch.empty(m, dtype=torch.float32, device=where)
    return codes, torch.empty((triton.cdiv(k, BLOCK), m), dtype=torch.float32, device=where).t()
