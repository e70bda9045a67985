# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: ANN001, ANN202
# (both: Triton types the arguments of jit functions)
"""A router and its experts as eight launches, for fused decoder layers on CUDA.

Computes: residual + the sum over a token's experts of its routing weight times
    down_e(silu(gate_e(x)) * up_e(x)); the weights are the largest k of the softmax of the router's
    logits, ties to the lowest expert, divided by their sum if the layer normalises them.
Reduction order: the softmax's over all experts in one block, the chosen weights' from the largest
    down; the products' and the combination's as in `grouped_matmul`.
Depends on: the token and the layer; not on other tokens or on how many chose an expert.
Dtypes: bfloat16, float16, float32.
Not claimed: the bits of the unfused layer, which rounds before the residual is added; gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.cuda.experts import route_experts
from ndcheck_kernels.cuda.products.grouped_matmul import combine, grouped_matmul
from ndcheck_kernels.cuda.products.matmul import matmul
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul

BLOCKS = ("Qwen3MoeSparseMoeBlock",)

# What one block computes, as `Scope.fires` counts it.
FIRES = {"linear": 1, "topk": 1, "route_experts": 1, "_grouped_mm": 2, "silu_mul": 1}
FIRES |= {"combine_experts": 1}


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


def is_mixture(block: Any) -> bool:
    """Whether `mixture` computes what this transformers module does."""
    if type(block).__name__ not in BLOCKS:
        return False
    own = block.experts
    return (
        type(own.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and own.gate_up_proj.dtype == own.down_proj.dtype == block.gate.weight.dtype
        and not getattr(own, "_is_expert_parallel", False)  # Since transformers 5.18.
    )


def mixture(rows: torch.Tensor, block: Any, residual: torch.Tensor) -> torch.Tensor:
    """rows and residual [T, H] -> [T, H], for a block that `is_mixture`."""
    router, own = block.gate, block.experts
    logits = matmul(rows, router.weight.t())
    weights, index = choose(logits, router.top_k, router.norm_topk_prob)
    token, _, place, weights, ends = route_experts(index, weights, own.num_experts)
    hidden = grouped_matmul(rows[token], own.gate_up_proj.mT, ends)
    gate, up = hidden.chunk(2, -1)
    hidden = grouped_matmul(silu_mul(gate, up), own.down_proj.mT, ends)
    return combine(hidden, place, weights, residual)
