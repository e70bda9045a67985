"""FP8 weights with a scale a tensor or an output times quantised rows, alone and in groups.

Computes: (sum over blocks b of K of p[b]) * (s * t), plus an addend, as `ops.row_fp8` says.
Reduction order: that of `block_fp8`, but blocks are added unscaled; s * t is multiplied once, at
    the end; the addend last; one rounding.
Depends on: K, dtype, architecture. Not on N or M, the row's position or its neighbours: schedules
    are those of `block_fp8`.
Dtypes: float8_e4m3fn codes, float32 scales; result and addend bfloat16, float16 or float32.
Not claimed: what `block_fp8` does not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.cuda.products.fp8.block_fp8 import require_readable, split
from ndcheck_kernels.cuda.products.fp8.fp8_configs import Fp8Config, grouped_config, product_config
from ndcheck_kernels.cuda.products.grouped_matmul import _find_rows
from ndcheck_kernels.cuda.products.tiles import accumulate, offsets, sum_groups, zeros
from ndcheck_kernels.ops.block_fp8 import BLOCK


@triton.jit
def _sum_codes(
    x_desc, w_desc, first_m, first_w, first_k, last_k, WALK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """The blocks from column first_k to last_k, of several groups if WALK.

    A block's sum starts from zero: the tensor cores keep fewer bits than float32.
    """
    tot = zeros(BLOCK_M, BLOCK_N, SWAP)
    acc = zeros(BLOCK_M, BLOCK_N, SWAP)
    for k in range(first_k, last_k, 128):
        x = x_desc.load([first_m, k])  # [BLOCK_M, 128]
        w = w_desc.load([first_w, k])  # [BLOCK_N, 128]
        acc = acc + accumulate(x, w, zeros(BLOCK_M, BLOCK_N, SWAP), SWAP)
        if WALK:  # noqa: SIM102 - the jit compiler drops it where it is false
            if (k + 128) % 1024 == 0:
                tot = tot + acc
                acc = zeros(BLOCK_M, BLOCK_N, SWAP)
    return tot + acc


@triton.jit(do_not_specialize=["M", "span"])
def _row_fp8_kernel(
    x_desc, w_desc, s_ptr, t_ptr, c_ptr, y_ptr, partial_ptr, counter_ptr, M, N, K, span,
    stride_cm, stride_cn, stride_ym, PARTS: tl.constexpr, WALK: tl.constexpr, HAS_C: tl.constexpr,
    SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """PARTS: programs of a tile, each with a K-group, or one that may WALK over several."""
    follow(PDL)
    tile, group = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    num_m = tl.cdiv(M, BLOCK_M)
    first_m, first_n = (tile % num_m) * BLOCK_M, (tile // num_m) * BLOCK_N
    first_k = group * 1024
    last_k = tl.minimum(K, first_k + 1024) if PARTS > 1 else K
    offs_m, offs_n = offsets(first_m, first_n, BLOCK_M, BLOCK_N, SWAP)
    acc = _sum_codes(
        x_desc, w_desc, first_m, first_n, first_k, last_k, WALK, BLOCK_M, BLOCK_N, SWAP
    )
    mask = (offs_m < M) & (offs_n < N)
    last = True
    if PARTS > 1:
        acc, last = sum_groups(
            acc, partial_ptr + offs_m * N + offs_n, M.to(tl.int64) * N, mask, group,
            counter_ptr + tile, PARTS,
        )  # fmt: skip
    if last:
        s = tl.load(s_ptr + offs_m, offs_m < M, other=0.0)
        t = tl.load(t_ptr + offs_n.to(tl.int32) // span, offs_n < N, other=0.0)
        acc = acc * (s * t)
        if HAS_C:
            c = tl.load(c_ptr + offs_m * stride_cm + offs_n * stride_cn, mask, other=0.0)
            acc += c.to(tl.float32)
        tl.store(y_ptr + offs_m * stride_ym + offs_n, acc.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M", "span"])
def _grouped_row_fp8_kernel(
    x_desc, w_desc, s_ptr, t_ptr, y_ptr, partial_ptr, counter_ptr, ends_ptr, E, M, N, K, span,
    stride_te, stride_ym, PARTS: tl.constexpr, WALK: tl.constexpr, E_BLOCK: tl.constexpr,
    SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
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
        acc = _sum_codes(
            x_desc, w_desc, first_m, group * N + first_n, first_k, last_k, WALK, BLOCK_M, BLOCK_N,
            SWAP,
        )  # fmt: skip
        mask = (offs_m < end) & (offs_n < N)
        last = True
        if PARTS > 1:
            acc, last = sum_groups(
                acc, partial_ptr + offs_m * N + offs_n, M.to(tl.int64) * N, mask, part,
                counter_ptr + tile, PARTS,
            )  # fmt: skip
        if last:
            s = tl.load(s_ptr + offs_m, offs_m < end, other=0.0)
            t_ptrs = t_ptr + group.to(tl.int64) * stride_te + offs_n.to(tl.int32) // span
            t = tl.load(t_ptrs, offs_n < N, other=0.0)
            acc = acc * (s * t)
            tl.store(y_ptr + offs_m * stride_ym + offs_n, acc.to(y_ptr.dtype.element_ty), mask)


def row_fp8_matmul(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    addend: torch.Tensor | None = None, *, dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """codes [M, K], row_scales [M], weight [N, K], scales [S], each of N / S outputs, addend [N] or
    [M, N] -> [M, N].
    """
    capability = device.capability(codes.device)
    config = product_config(len(codes), len(weight), weight.shape[1], capability)
    return _launch(codes, row_scales, weight, scales, addend, dtype, config)


def _launch(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    addend: torch.Tensor | None, dtype: torch.dtype, config: Fp8Config,
) -> torch.Tensor:  # fmt: skip
    (m, k), n = codes.shape, weight.shape[0]
    require_readable(codes, weight)
    y = torch.empty((m, n), dtype=dtype, device=codes.device)
    if y.numel() == 0:
        return y
    c = y if addend is None else addend.expand(m, n)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    parts, walk, *shared = split(config, k, y, tiles)
    _row_fp8_kernel[(tiles * parts,)](
        TensorDescriptor.from_tensor(codes, [config.block_m, BLOCK]),
        TensorDescriptor.from_tensor(weight, [config.block_n, BLOCK]),
        row_scales.contiguous(), scales.contiguous(), c, y, *shared, m, n, k, n // len(scales),
        *c.stride(), y.stride(0), PARTS=parts, WALK=walk, HAS_C=addend is not None,
        SWAP=config.swap, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.warps,
        num_stages=config.stages, enable_fp_fusion=False, **pdl(y.device),
    )  # fmt: skip
    return y


def grouped_row_fp8_matmul(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    ends: torch.Tensor, *, dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """codes [P, K] in order of groups, row_scales [P], weight [E, N, K], scales [E, S], ends [E]
    int32 -> [P, N].
    """
    capability = device.capability(codes.device)
    config = grouped_config(len(codes), len(weight), weight.shape[1], capability)
    return _launch_grouped(codes, row_scales, weight, scales, ends, dtype, config)


def _launch_grouped(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    ends: torch.Tensor, dtype: torch.dtype, config: Fp8Config,
) -> torch.Tensor:  # fmt: skip
    (m, k), (e, n, _) = codes.shape, weight.shape
    require_readable(codes, weight)
    y = torch.empty((m, n), dtype=dtype, device=codes.device)
    if y.numel() == 0:
        return y
    scales = scales.contiguous()
    # A group adds at most one tile that is not full.
    tiles = (min(e, m) + m // config.block_m) * triton.cdiv(n, config.block_n)
    parts, walk, *shared = split(config, k, y, tiles)
    _grouped_row_fp8_kernel[(tiles * parts,)](
        TensorDescriptor.from_tensor(codes, [config.block_m, BLOCK]),
        TensorDescriptor.from_tensor(
            weight.as_strided((e * n, k), (weight.stride(1), 1)), [config.block_n, BLOCK]
        ),
        row_scales.contiguous(), scales, y, *shared, ends.to(torch.int32).contiguous(), e, m, n, k,
        n // scales.shape[1], scales.stride(0), y.stride(0), PARTS=parts, WALK=walk,
        E_BLOCK=triton.next_power_of_2(e), SWAP=config.swap, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, num_warps=config.warps, num_stages=config.stages,
        enable_fp_fusion=False, **pdl(y.device),
    )  # fmt: skip
    return y
