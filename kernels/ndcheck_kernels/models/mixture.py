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

from ndcheck_kernels.cuda.products.fp8.fp8_matmul import grouped_fp8_matmul
from ndcheck_kernels.cuda.products.grouped_matmul import combine, grouped_gate, grouped_matmul
from ndcheck_kernels.cuda.products.matmul import matmul
from ndcheck_kernels.cuda.routing import choose_routes
from ndcheck_kernels.cuda.rows.quantise import OneScale, Quantised, quantise_rows, silu_mul_quantise
from ndcheck_kernels.models.interface import here
from ndcheck_kernels.models.quantised import is_block_fp8, is_fp8

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
        and (is_plain or is_fp8(own))
        and not getattr(own, "_is_expert_parallel", False)  # Since transformers 5.18.
    )


def mixture_fires(block: Any, *, is_part: bool) -> dict[str, int]:
    """What one block computes, as `Scope.fires` counts it."""
    own = block.experts
    if not is_fp8(own):
        whole, part = "_grouped_mm", "partial_grouped"
    else:
        whole = "block_fp8_grouped" if is_block_fp8(own) else "row_fp8_grouped"
        part = f"partial_{whole}"
    return _FIRES | ({whole: 1, part: 1} if is_part else {whole: 2})


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
    token, expert, place, weights, ends = choose_routes(logits, router.top_k, router.norm_topk_prob)
    if is_fp8(own):
        out = _fp8_products(own, rows, token, expert, ends, dtype)
    else:
        out = _plain_products(own, rows, token, ends, dtype)
    return combine(out, place, weights, residual)


def _plain_products(
    own: Any, rows: torch.Tensor, token: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    gated = grouped_gate(rows, token, here(own.gate_up_proj).mT, ends)
    down = here(own.down_proj).mT
    out = rows.new_empty(len(token), down.shape[2], dtype=dtype)
    return grouped_matmul(gated, down, ends, out)


def _fp8_products(
    own: Any,
    rows: torch.Tensor,
    token: torch.Tensor,
    expert: torch.Tensor,
    ends: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    first, second = (_one_scale(own, name, expert) for name in ("gate_up_proj", "down_proj"))
    codes = quantise_rows(rows, token, one_scale=first)
    gate_up = _grouped(own, "gate_up_proj", codes, ends, rows.dtype)
    codes = silu_mul_quantise(*gate_up.chunk(2, -1), one_scale=second)
    return _grouped(own, "down_proj", codes, ends, dtype)


def _one_scale(own: Any, name: str, expert: torch.Tensor) -> OneScale | None:
    """How rows that go to these experts [P] are quantised; None: in blocks."""
    if is_block_fp8(own):
        return None
    given = getattr(own, f"{name}_activation_scale", None)
    return OneScale(None if given is None else here(given).reshape(-1)[expert])


def _grouped(
    own: Any, name: str, codes: Quantised, ends: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    weight, scales = here(getattr(own, name)), here(getattr(own, f"{name}_scale_inv"))
    if not is_block_fp8(own):
        scales = scales.reshape(len(weight), -1)
    return grouped_fp8_matmul(*codes, weight, scales, ends, dtype=dtype)
