"""Which experts a router chooses, for fused layers.

Computes: the largest k of the softmax of a token's logits, ties to the lowest expert, divided by
    their sum if asked.
Reduction order: the softmax's over all experts in one block; the chosen weights' from the largest
    down.
Depends on: the token's logits, dtype, architecture, Triton version.
Dtypes: bfloat16, float16, float32.
Not claimed: gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import follow, pdl


@triton.jit
def _choose_kernel(
    logits_ptr, weights_ptr, index_ptr, E, stride_m,
    NORMALISE: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    mask = expert < E
    x = tl.load(logits_ptr + token * stride_m + expert, mask, other=float("-inf")).to(tl.float32)
    x = tl.exp(x - tl.max(x, 0))
    probability = x / tl.sum(x, 0)
    left = tl.where(mask, probability, -1.0)
    rank = tl.arange(0, K_BLOCK)
    chosen = tl.zeros((K_BLOCK,), dtype=tl.float32)
    tot = 0.0
    for i in tl.static_range(TOP_K):
        # NaN is never the largest: the index stays one of an expert, and the weight tells.
        best = tl.min(tl.where(left == tl.max(left, 0), expert, BLOCK), 0)
        best = tl.minimum(best, E - 1)
        value = tl.sum(tl.where(expert == best, probability, 0.0), 0)
        tl.store(index_ptr + token * TOP_K + i, best.to(tl.int64))
        chosen = tl.where(rank == i, value, chosen)
        left = tl.where(expert == best, -1.0, left)
        tot += value
    if NORMALISE:
        chosen = chosen / tot
    tl.store(
        weights_ptr + token * TOP_K + rank, chosen.to(weights_ptr.dtype.element_ty), rank < TOP_K
    )


def choose(logits: torch.Tensor, k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts of each token: logits [T, E] -> weights [T, k], index [T, k] int64."""
    device.require_float("choose", logits)
    tokens, experts = logits.shape
    if not 0 < k <= experts:
        raise ValueError(f"choose cannot take {k} of {experts} experts")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    weights = logits.new_empty((tokens, k))
    index = torch.empty((tokens, k), dtype=torch.int64, device=logits.device)
    if tokens:
        _choose_kernel[(tokens,)](
            logits, weights, index, experts, logits.stride(0), NORMALISE=normalise, TOP_K=k,
            K_BLOCK=triton.next_power_of_2(k), BLOCK=triton.next_power_of_2(experts), num_warps=4,
            enable_fp_fusion=False, **pdl(logits.device),
        )  # fmt: skip
    return weights, index
