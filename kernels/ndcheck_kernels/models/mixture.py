"""A router and its experts as eight launches, for fused decoder layers on CUDA.

Computes: residual + the sum over a token's experts of its routing weight times
    down_e(silu(gate_e(x)) * up_e(x)); the weights are the largest k of the softmax of the router's
    logits, ties to the lowest expert, divided by their sum if the layer normalises them.
Reduction order: the weights' as in `cuda.routing`; the products' and the combination's as in
    `cuda.products.grouped_matmul`, the products' of FP8 weights as in `cuda.products.block_fp8`.
Depends on: the token and the layer; not on other tokens or on how many chose an expert.
Dtypes: bfloat16, float16, float32.
Not claimed: the bits of the unfused layer, which rounds before the residual is added; gradients.
"""

from __future__ import annotations

from typing import Any

import torch

from ndcheck_kernels.cuda.experts import route_experts
from ndcheck_kernels.cuda.products.block_fp8 import grouped_block_fp8_matmul
from ndcheck_kernels.cuda.products.grouped_matmul import combine, grouped_matmul
from ndcheck_kernels.cuda.products.matmul import matmul
from ndcheck_kernels.cuda.routing import choose
from ndcheck_kernels.cuda.rows.quantise import quantise_rows, silu_mul_quantise
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul
from ndcheck_kernels.models.quantised import is_block_fp8

BLOCKS = ("Qwen3MoeSparseMoeBlock",)

_FIRES = {"linear": 1, "topk": 1, "route_experts": 1, "silu_mul": 1, "combine_experts": 1}


def is_mixture(block: Any) -> bool:
    """Whether `mixture` computes what this transformers module does."""
    if type(block).__name__ not in BLOCKS:
        return False
    own = block.experts
    is_plain = own.gate_up_proj.dtype == own.down_proj.dtype == block.gate.weight.dtype
    return (
        type(own.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and (is_plain or is_block_fp8(own))
        and not getattr(own, "_is_expert_parallel", False)  # Since transformers 5.18.
    )


def mixture_fires(block: Any) -> dict[str, int]:
    """What one block computes, as `Scope.fires` counts it."""
    return _FIRES | {"block_fp8_grouped" if is_block_fp8(block.experts) else "_grouped_mm": 2}


def mixture(rows: torch.Tensor, block: Any, residual: torch.Tensor) -> torch.Tensor:
    """rows and residual [T, H] -> [T, H], for a block that `is_mixture`."""
    router, own = block.gate, block.experts
    logits = matmul(rows, router.weight.t())
    weights, index = choose(logits, router.top_k, router.norm_topk_prob)
    token, _, place, weights, ends = route_experts(index, weights, own.num_experts)
    products = _fp8_products if is_block_fp8(own) else _plain_products
    return combine(products(own, rows, token, ends), place, weights, residual)


def _plain_products(
    own: Any, rows: torch.Tensor, token: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    gate, up = grouped_matmul(rows[token], own.gate_up_proj.mT, ends).chunk(2, -1)
    return grouped_matmul(silu_mul(gate, up), own.down_proj.mT, ends)


def _fp8_products(
    own: Any, rows: torch.Tensor, token: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    codes = quantise_rows(rows, token)
    gate, up = grouped_block_fp8_matmul(
        *codes, own.gate_up_proj, own.gate_up_proj_scale_inv, ends, dtype=rows.dtype
    ).chunk(2, -1)
    codes = silu_mul_quantise(gate, up)
    return grouped_block_fp8_matmul(
        *codes, own.down_proj, own.down_proj_scale_inv, ends, dtype=rows.dtype
    )
