"""The two ops around a layer's experts: which rows go to which expert, and their sum by token.

`models.experts` is the layer that they belong to.
"""

import torch

from ndcheck_kernels.ops.library import declare

# Lines the P = T * k pairs of a token and an expert up, those of one expert together and tokens in
# order, so that one product serves them. From index and weights [T, k]: the token and the expert of
# each row [P]; by token, its experts in ascending order: their rows [T, k] and weights [T, k]; and
# where each expert's rows end [E] int32.
route_op = declare(
    "route_experts(Tensor index, Tensor weights, int experts) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# out[t] = sum over i of weights[t, i] * rows[place[t, i]]: [P, H], [T, k], [T, k] -> [T, H].
combine_op = declare("combine_experts(Tensor rows, Tensor place, Tensor weights) -> Tensor")


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
