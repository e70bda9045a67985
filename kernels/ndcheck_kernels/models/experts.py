"""A mixture of experts in which no token knows which others chose its experts.

Computes: the sum over a token's experts e, in ascending order of e, of its routing weight times
    down_e(gate(up_e(x))), with the biases that the layer has. No expert has a capacity, so no token
    is dropped, and nothing is added by atomics.
Reduction order: both products are those of `aten._grouped_mm` at the same (K, N), of FP8 weights
    those of `ops.block_fp8`, `ops.row_fp8` or `ops.mxfp4`, whatever the number of rows that an
    expert gets.
    `combine_experts` adds a token's outputs one after the other in float32 (float64 for float64)
    and rounds once.
Depends on: the token, its own experts and weights, the layer's sizes and layout, dtype.
Dtypes: those of the two ops on the device.
Not claimed: the order of a token's experts in the routing tensors, which changes nothing.

transformers' stacked layouts are all covered: [E, 2I, H] or transposed, gates concatenated or
interleaved, with and without biases. Experts in a module list are ordinary linear layers under a
loop; they need no implementation of their own.
"""

from typing import Any

import torch

from ndcheck_kernels.models.interface import require_scope
from ndcheck_kernels.models.quantised import (
    expert_products,
    is_fp8,
    register_fp8_experts,
)
from ndcheck_kernels.ops import mxfp4
from ndcheck_kernels.ops.experts import combine_op, route_op
from ndcheck_kernels.ops.library import NAME
from ndcheck_kernels.scope.refusal import refusal

aten = torch.ops.aten


def register_experts() -> None:
    """Make `experts_implementation="ndcheck_invariant"` known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    register_fp8_experts(experts_forward)


def experts_forward(
    layer: Any, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What a transformers experts module calls: x [T, H], both others [T, k] -> [T, H]."""
    require_scope("experts", stock="grouped_mm")
    if getattr(layer, "_is_expert_parallel", False):  # Since transformers 5.18.
        raise refusal("experts", x.dtype, x.device.type, "experts are spread over devices")
    token, expert, place, weights, ends = route_op(top_k_index, top_k_weights, layer.num_experts)
    hidden = x[token]
    hidden = _linear(layer, "gate_up_proj" if layer.has_gate else "up_proj", hidden, expert, ends)
    hidden = layer._apply_gate(hidden) if layer.has_gate else layer.act_fn(hidden)
    hidden = _linear(layer, "down_proj", hidden, expert, ends)
    if getattr(layer, "has_post_expert_norm", False):
        hidden = layer.post_expert_norm(hidden)
    return combine_op(hidden, place, weights)


def _linear(
    layer: Any, name: str, rows: torch.Tensor, expert: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    if (blocks := getattr(layer, f"{name}_blocks", None)) is not None:
        product: torch.Tensor = mxfp4.grouped_op(
            rows, blocks, getattr(layer, f"{name}_scales"), ends
        )
        return product + getattr(layer, f"{name}_bias")[expert] if layer.has_bias else product
    weight = getattr(layer, name)
    if is_fp8(layer):
        return expert_products(layer, name, rows, ends)
    if not weight.is_floating_point() or weight.dtype != rows.dtype:
        reason = f"{name} is kept as {weight.dtype}: quantised weights have no kernel here"
        raise refusal("experts", weight.dtype, weight.device.type, reason)
    out: torch.Tensor = aten._grouped_mm.default(
        rows, weight if layer.is_transposed else weight.transpose(1, 2), ends
    )
    return out + getattr(layer, f"{name}_bias")[expert] if layer.has_bias else out
