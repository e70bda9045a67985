"""A mixture of experts in which no token knows which others chose its experts.

Computes: the sum over a token's experts e, in ascending order of e, of its routing weight times
    down_e(gate(up_e(x))), with the biases that the layer has. No expert has a capacity, so no token
    is dropped, and nothing is added by atomics.
Reduction order: both products are those of `aten._grouped_mm` at the same (K, N), whatever the
    number of rows that an expert gets; `combine_experts` adds a token's outputs one after the other
    in float32 (float64 for float64) and rounds once.
Depends on: the token, its own experts and weights, the layer's sizes and layout, dtype.
Dtypes: those of the two ops on the device.
Not claimed: the order of a token's experts in the routing tensors, which changes nothing.

transformers' stacked layouts are all covered: [E, 2I, H] or transposed, gates concatenated or
interleaved, with and without biases. Experts in a module list are ordinary linear layers under a
loop; they need no implementation of their own.
"""

from typing import Any

import torch

from ndcheck_kernels.scope.mode import refusal

NAME = "ndcheck_invariant"

aten = torch.ops.aten

_library = torch.library.Library("ndcheck_kernels", "FRAGMENT")
# Lines the P = T * k pairs of a token and an expert up, those of one expert together and tokens in
# order, so that one product serves them. From index and weights [T, k]: the token and the expert of
# each row [P]; by token, its experts in ascending order: their rows [T, k] and weights [T, k]; and
# where each expert's rows end [E] int32.
_library.define(
    "route_experts(Tensor index, Tensor weights, int experts) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
route_op = torch.ops.ndcheck_kernels.route_experts.default
# out[t] = sum over i of weights[t, i] * rows[place[t, i]]: [P, H], [T, k], [T, k] -> [T, H].
_library.define("combine_experts(Tensor rows, Tensor place, Tensor weights) -> Tensor")
combine_op = torch.ops.ndcheck_kernels.combine_experts.default


def _refuse_outside_scope(*args: Any) -> Any:
    raise RuntimeError(
        f"experts_implementation='{NAME}' only runs inside ndcheck_kernels.invariant_kernels(); "
        "for stock kernels call model.set_experts_implementation('grouped_mm')"
    )


_library.impl("route_experts", _refuse_outside_scope, "CompositeExplicitAutograd")
_library.impl("combine_experts", _refuse_outside_scope, "CompositeExplicitAutograd")


def register_experts() -> None:
    """Make `experts_implementation="ndcheck_invariant"` known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    layer: Any, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What a transformers experts module calls: x [T, H], both others [T, k] -> [T, H]."""
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


def route_by_sorting(
    index: torch.Tensor, weights: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `route_op` computes, by torch's sorts."""
    tokens, k = index.shape
    ascending, order = index.sort(dim=-1)
    expert, rows = ascending.flatten().sort(stable=True)
    place = torch.empty_like(rows)
    place[rows] = torch.arange(tokens * k, device=index.device)
    bounds = torch.arange(experts, device=index.device, dtype=index.dtype)
    ends = torch.searchsorted(expert, bounds, right=True, out_int32=True)
    token = rows.div(k, rounding_mode="floor")
    return token, expert, place.view(tokens, k), weights.gather(-1, order), ends


def _linear(
    layer: Any, name: str, rows: torch.Tensor, expert: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    weight = getattr(layer, name)
    if not weight.is_floating_point() or weight.dtype != rows.dtype:
        reason = f"{name} is kept as {weight.dtype}: quantised weights have no kernel here"
        raise refusal("experts", weight.dtype, weight.device.type, reason)
    out: torch.Tensor = aten._grouped_mm.default(
        rows, weight if layer.is_transposed else weight.transpose(1, 2), ends
    )
    return out + getattr(layer, f"{name}_bias")[expert] if layer.has_bias else out
