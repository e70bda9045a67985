"""Experts in MXFP4: those that have rows are unpacked, and `grouped_matmul` has them.

Computes: what `ops.mxfp4` says.
Reduction order, Depends on: `grouped_matmul`'s.
Dtypes: rows and result bfloat16, float16 or float32; blocks and scales uint8.
Not claimed: what `grouped_matmul` does not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.cuda.products.grouped_matmul import grouped_matmul

_ROWS = 32


@triton.jit
def _unpack_experts_kernel(
    blocks_ptr, scales_ptr, ends_ptr, y_ptr, N, K, BLOCK_N: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    follow(PDL)
    expert = tl.program_id(2).to(tl.int64)
    start = tl.load(ends_ptr + tl.maximum(expert - 1, 0)) * (expert > 0).to(tl.int32)
    if tl.load(ends_ptr + expert) == start:
        return  # Nobody reads what would be written.
    offs_n = (expert * N + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    offs_k = (tl.program_id(1) * 128 + tl.arange(0, 128))[None, :]
    mask = (offs_n < (expert + 1) * N) & (offs_k < K)
    both = tl.load(blocks_ptr + offs_n * (K // 2) + offs_k // 2, mask, other=0).to(tl.int32)
    code = (both >> (offs_k % 2 * 4)) & 15
    size = code & 7
    # The bits of a float32: 0.5 alone has an exponent that its code does not show.
    bits = ((size >> 1) + 126 << 23) | ((size & 1) << 22)
    bits = tl.where(size == 1, 0x3F000000, tl.where(size == 0, 0, bits))
    value = (bits | (code >> 3 << 31)).to(tl.float32, bitcast=True)
    scale = tl.load(scales_ptr + offs_n * (K // 32) + offs_k // 32, mask, other=127).to(tl.int32)
    power = tl.where(scale == 255, 0x7FC00000, tl.where(scale == 0, 1 << 22, scale << 23))
    w = value * power.to(tl.float32, bitcast=True)
    tl.store(y_ptr + offs_n * K + offs_k, w.to(y_ptr.dtype.element_ty), mask)


def mxfp4_matmul(
    rows: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """rows [P, K] in order of groups, blocks [E, N, K / 32, 16], scales [E, N, K / 32], ends [E]
    -> [P, N].
    """
    if not (blocks.is_contiguous() and scales.is_contiguous()):
        raise ValueError("blocks and scales must be contiguous")
    experts, n, k = *blocks.shape[:2], rows.shape[1]
    weight = torch.empty((experts, n, k), dtype=rows.dtype, device=rows.device)
    ends = ends.to(torch.int32).contiguous()
    _unpack_experts_kernel[(triton.cdiv(n, _ROWS), triton.cdiv(k, 128), experts)](
        blocks, scales, ends, weight, n, k, BLOCK_N=_ROWS, num_warps=4, **pdl(rows.device)
    )
    return grouped_matmul(rows, weight.mT, ends)
