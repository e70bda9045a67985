"""A router and its experts as eight launches, for fused decoder layers on CUDA.

Computes: residual + the sum over a token's experts of its routing weight times
    down_e(silu(gate_e(x)) * up_e(x)); the weights are the largest k of the softmax of the router's
    logits, ties to the lowest expert, divided by their sum if the layer normalises them.
Reduction order: the weights' as in `cuda.routing`; the products' and the combination's as in
    `cuda.products.grouped_matmul`.
Depends on: the token and the layer; not on other tokens or on how many chose an expert.
Dtypes: bfloat16, float16, float32.
Not claimed: the bits of the unfused layer, which rounds before the residual is added; gradients.
"""

from __future__ import annotations

from typing import Any

import torch

from ndcheck_kernels.cuda.experts import route_experts
from ndcheck_kernels.cuda.products.grouped_matmul import combine, grouped_matmul
from ndcheck_kernels.cuda.products.matmul import matmul
from ndcheck_kernels.cuda.routing import choose
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul

BLOCKS = ("Qwen3MoeSparseMoeBlock",)

# What one block computes, as `Scope.fires` counts it.
FIRES = {"linear": 1, "topk": 1, "route_experts": 1, "_grouped_mm": 2, "silu_mul": 1}
FIRES |= {"combine_experts": 1}


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
