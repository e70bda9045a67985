"""Rows as e4m3 codes with a scale for every 128 columns: as they are, after RMSNorm or a gate.

Or with one scale for the whole row, as it is.

Computes: what `ops.block_fp8` or `ops.row_fp8` says of a row; the quotients are IEEE
    divisions. After RMSNorm or silu(gate) * up, of the row that `rms_norm` and `silu_mul` would
    have rounded to its dtype.
Reduction order: a maximum has none; RMSNorm's is that of `rms_norm`.
Depends on: the row, dtype, architecture, Triton version.
Dtypes: bfloat16, float16, float32 to float8_e4m3fn and float32.
Not claimed: gradients.
"""

from __future__ import annotations

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
"""Codes [M, K] and scales [M, K / 128], one column of scales after the other in memory."""

_BLOCKS = 8
"""Of 128 columns, in one program."""


@triton.jit
def quantise_blocks(x):
    """[..., 128] float32 -> quotients in the range of e4m3, and scales [..., 1]."""
    largest = tl.max(tl.abs(x), axis=-1, keep_dims=True)
    scale = tl.maximum(tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32)), 2.0**-126)
    return tl.div_rn(x, tl.broadcast_to(scale, x.shape)), scale


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
    offs_k = block * 128 + tl.arange(0, 128)[None, :]
    mask = offs_k < K
    loaded = tl.load(x_ptr + source * stride_xm + offs_k, mask, other=0.0)  # [BLOCKS, 128]
    x = loaded.to(tl.float32)
    if HAS_UP:
        up = tl.load(up_ptr + source * stride_um + offs_k, mask, other=0.0)
        x = silu_times(loaded, up).to(loaded.dtype).to(tl.float32)
    quotients, scale = quantise_blocks(x)
    tl.store(codes_ptr + row * K + offs_k, quotients.to(codes_ptr.dtype.element_ty), mask)
    tl.store(scales_ptr + block * stride_sb + row, scale, block * 128 < K)


@triton.jit
def _quantise_whole_kernel(
    x_ptr, given_ptr, codes_ptr, scales_ptr, K, bound, stride_xm, stride_given,
    IS_GIVEN: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row * stride_xm + offs_k, offs_k < K, other=0.0).to(tl.float32)
    if IS_GIVEN:
        scale = tl.load(given_ptr + row * stride_given)
    else:
        scale = tl.div_rn(tl.minimum(tl.max(tl.abs(x), axis=0), bound), 448.0)
    scale = tl.maximum(scale, 2.0**-126)
    quotients = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    quotients = tl.clamp(quotients, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    codes_ptrs = codes_ptr + row * K + offs_k
    tl.store(codes_ptrs, quotients.to(codes_ptr.dtype.element_ty), offs_k < K)
    tl.store(scales_ptr + row, scale)


@triton.jit(do_not_specialize=["M", "stride_sb"])
def _rms_norm_quantise_kernel(
    x_ptr, weight_ptr, codes_ptr, scales_ptr, M, K, stride_xm, stride_sb, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    offs_k = tl.arange(0, COLUMNS)[None, :]
    mask = (offs_m < M) & (offs_k < K)
    loaded = tl.load(x_ptr + offs_m * stride_xm + offs_k, mask, other=0.0)  # [ROWS, COLUMNS]
    x = loaded.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / K + eps)
    y *= tl.load(weight_ptr + offs_k, offs_k < K, other=0.0).to(tl.float32)
    y = y.to(loaded.dtype).to(tl.float32)
    quotients, scale = quantise_blocks(tl.reshape(y, (ROWS, COLUMNS // 128, 128)))
    codes = tl.reshape(quotients, (ROWS, COLUMNS)).to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + offs_m * K + offs_k, codes, mask)
    block = tl.arange(0, COLUMNS // 128)[None, :]
    scale = tl.reshape(scale, (ROWS, COLUMNS // 128))
    tl.store(scales_ptr + block * stride_sb + offs_m, scale, (offs_m < M) & (block * 128 < K))


def quantise_rows(rows: torch.Tensor, place: torch.Tensor | None = None) -> Quantised:
    """rows [M, K], or of them those at ``place`` [P]."""
    device.require_float("quantise_rows", rows)
    return _launch(rows, None, place)


def silu_mul_quantise(gate: torch.Tensor, up: torch.Tensor) -> Quantised:
    """gate and up [M, K] may be the two halves of one projection: no copy is made."""
    device.require_float("silu_mul_quantise", gate, up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype} {tuple(gate.shape)}, up is unlike it")
    return _launch(gate, up, None)


def rms_norm_quantise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Quantised:
    """x [M, K], weight [K]; K up to 65536."""
    device.require_float("rms_norm_quantise", x, weight)
    rows, weight_row = device.aligned_rows(x), device.aligned_rows(weight)
    (m, k), tile = rows.shape, row_tile(rows.shape[1])
    codes, scales = empty(m, k, x.device)
    columns = max(tile.block, BLOCK)
    if m:
        _rms_norm_quantise_kernel[(triton.cdiv(m, tile.rows),)](
            rows, weight_row, codes, scales, m, k, rows.stride(0), scales.stride(1), eps,
            ROWS=tile.rows, COLUMNS=columns, num_warps=tile.warps, enable_fp_fusion=True,
            **pdl(x.device),
        )  # fmt: skip
    return codes, scales


def quantise_whole_rows(
    rows: torch.Tensor, given: torch.Tensor | None = None, bound: float = UNBOUNDED
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [M, K] -> codes [M, K] and scales [M], as `ops.row_fp8` says; given [M]; K to 65536."""
    device.require_float("quantise_whole_rows", rows)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (m, k), tile = rows.shape, row_tile(rows.shape[1])
    codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=rows.device)
    scales = torch.empty(m, dtype=torch.float32, device=rows.device)
    if codes.numel():
        _quantise_whole_kernel[(m,)](
            rows, scales if given is None else given, codes, scales, k, bound, rows.stride(0),
            0 if given is None else given.stride(0), IS_GIVEN=given is not None,
            COLUMNS=tile.block, num_warps=tile.warps, **pdl(rows.device),
        )  # fmt: skip
    return codes, scales


def _launch(x: torch.Tensor, up: torch.Tensor | None, place: torch.Tensor | None) -> Quantised:
    x = x if x.stride(1) == 1 else x.contiguous()
    if up is not None and up.stride(1) != 1:
        up = up.contiguous()
    m, k = len(x) if place is None else len(place), x.shape[1]
    codes, scales = empty(m, k, x.device)
    if codes.numel():
        _quantise_kernel[(m, triton.cdiv(k, _BLOCKS * BLOCK))](
            x, x if up is None else up, codes if place is None else place, codes, scales, k,
            x.stride(0), 0 if up is None else up.stride(0), scales.stride(1),
            HAS_UP=up is not None, HAS_PLACE=place is not None, BLOCKS=_BLOCKS, num_warps=4,
            enable_fp_fusion=True, **pdl(x.device),
        )  # fmt: skip
    return codes, scales


def empty(m: int, k: int, where: torch.device) -> Quantised:
    codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=where)
    return codes, torch.empty((triton.cdiv(k, BLOCK), m), dtype=torch.float32, device=where).t()
