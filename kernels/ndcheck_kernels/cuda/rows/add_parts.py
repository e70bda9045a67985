"""Parts of a sum, which ranks or groups of K give, added in one order and rounded once.

Computes: the sum of P parts, plus an addend if given, in fp32; rounded to the dtype of the addend,
    or of the parts.
Reduction order: that of `ops.collectives.add_pairwise`: neighbours first, then neighbouring pairs;
    the addend last.
Depends on: P.
Dtypes: bfloat16, float16, float32; the addend may have another of them.
Not claimed: P that is no power of two; gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device

_BLOCK = 1024


@triton.jit
def _branch(parts_ptrs, stride, mask, FIRST: tl.constexpr, PARTS: tl.constexpr):
    """The sum of PARTS parts from the FIRST on."""
    if PARTS == 1:
        total = tl.load(parts_ptrs + FIRST * stride, mask, other=0.0).to(tl.float32)
    else:
        HALF: tl.constexpr = PARTS // 2
        left = _branch(parts_ptrs, stride, mask, FIRST, HALF)
        total = left + _branch(parts_ptrs, stride, mask, FIRST + HALF, HALF)
    return total


@triton.jit
def _add_parts_kernel(
    parts_ptr, addend_ptr, out_ptr, N,
    PARTS: tl.constexpr, HAS_ADDEND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    total = _branch(parts_ptr + offs, tl.cast(N, tl.int64), mask, 0, PARTS)
    if HAS_ADDEND:
        total += tl.load(addend_ptr + offs, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask)


def add_parts(parts: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
    """parts [P, M, N], addend [M, N] -> [M, N]. Raises ValueError for other shapes, or P."""
    n_parts, *shape = parts.shape
    device.require_float("add_parts", parts, addend)
    if n_parts < 1 or n_parts & (n_parts - 1):
        raise ValueError(f"add_parts of {n_parts} parts: it takes a power of two")
    if addend is not None and list(addend.shape) != shape:
        raise ValueError(f"add_parts cannot add {tuple(addend.shape)} to {tuple(shape)}")
    out = torch.empty(shape, dtype=(parts if addend is None else addend).dtype, device=parts.device)
    if out.numel():
        # No launch that starts early: what comes before may be a collective.
        _add_parts_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
            parts.contiguous(), out if addend is None else addend.contiguous(), out, out.numel(),
            PARTS=n_parts, HAS_ADDEND=addend is not None, BLOCK=_BLOCK, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
