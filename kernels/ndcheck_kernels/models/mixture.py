"""A router and its experts as six launches where rows are few, for fused decoder layers on CUDA.

Computes: residual + the sum over a token's experts of its routing weight times
    down_e(silu(gate_e(x)) * up_e(x)); the weights are the largest k of the softmax of the router's
    logits, ties to the lowest expert, divided by their sum if the layer normalises them.
Reduction order: the weights' as in `cuda.routing`; the products' and the combination's as in
    `cuda.products.grouped_matmul`, the products' of FP8 weights as in `cuda.products.fp8`.
Depends on: the token and the layer; not on other tokens or on how many chose an expert.
Dtypes: bfloat16, float16, float32.
Not claimed: the bits of the unfused layer, which rounds before the residual is added; gradients.

On ranks, each of which has some hidden features of every expert, `mixture_part` is the sum without
the residual, in fp32 and not rounded.
"""

from __future__ import annotations

from typing import Any

import torch

from ndcheck_kernels.cuda.products.fp8.block_fp8 import grouped_block_fp8_matmul
from ndcheck_kernels.cuda.products.grouped_matmul import (
    combine,
    grouped_gate,
    grouped_matmul,
)
from ndcheck_kernels.cuda.products.matmul import matmul
from ndcheck_kernels.cuda.routing import choose_routes
from ndcheck_kernels.cuda.rows.quantise import quantise_rows, silu_mul_quantise
from ndcheck_kernels.models.interface import here
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


def mixture_fires(block: Any, *, is_part: bool) -> dict[str, int]:
    """What one block computes, as `Scope.fires` counts it."""
    is_fp8 = is_block_fp8(block.experts)
    whole = "block_fp8_grouped" if is_fp8 else "_grouped_mm"
    if not is_part:
        return _FIRES | {whole: 2}
    return _FIRES | {whole: 1, "partial_block_fp8_grouped" if is_fp8 else "partial_grouped": 1}


def mixture(rows: torch.Tensor, block: Any, residual: torch.Tensor) -> torch.Tensor:
    """rows and residual [T, H] -> [T, H], for a block that `is_mixture`."""
    return _mixture(rows, block, residual, rows.dtype)


def mixture_part(rows: torch.Tensor, block: Any) -> torch.Tensor:
    """rows [T, H] -> [T, H] fp32."""
    return _mixture(rows, block, None, torch.float32)


def _mixture(
    rows: torch.Tensor, block: Any, residual: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    router, own = block.gate, block.experts
    logits = matmul(rows, here(router.weight).t())
    token, _, place, weights, ends = choose_routes(logits, router.top_k, router.norm_topk_prob)
    products = _fp8_products if is_block_fp8(own) else _plain_products
    return combine(products(own, rows, token, ends, dtype), place, weights, residual)


def _plain_products(
    own: Any, rows: torch.Tensor, token: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    gated = grouped_gate(rows, token, here(own.gate_up_proj).mT, ends)
    down = here(own.down_proj).mT
    out = rows.new_empty(len(token), down.shape[2], dtype=dtype)
    return grouped_matmul(gated, down, ends, out)


def _fp8_products(
    own: Any, rows: torch.Tensor, token: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    codes = quantise_rows(rows, token)
    gate, up = grouped_block_fp8_matmul(
        *codes, here(own.gate_up_proj), here(own.gate_up_proj_scale_inv), ends, dtype=rows.dtype
    ).chunk(2, -1)
    codes = silu_mul_quantise(gate, up)
    return grouped_block_fp8_matmul(
        *codes, here(own.down_proj), here(own.down_proj_scale_inv), ends, dtype=dtype
    )
