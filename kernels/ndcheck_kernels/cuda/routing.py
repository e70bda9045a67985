"""Which experts a router chooses, and in which rows their tokens lie.

Computes: the largest k of the softmax of a token's logits, ties to the lowest expert, divided by
    their sum if asked; and what `ops.experts.route_op` computes.
Reduction order: the softmax's over all experts in one block; the chosen weights' from the largest
    down. All else is of integers.
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
from ndcheck_kernels.ops.experts import route_by_sorting

MOST_COUNTED = 4096
"""Pairs of a token and an expert up to which counting beats sorting."""

Routes = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""What `ops.experts.route_op` gives."""


@triton.jit
def _choose_kernel(
    logits_ptr, weights_ptr, index_ptr, token_ptr, place_ptr, ends_ptr, E, stride_m,
    NORMALISE: tl.constexpr, ALONE: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ALONE: there is one token, whose experts are stored in ascending order, with its routes."""
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    mask = expert < E
    x = tl.load(logits_ptr + token * stride_m + expert, mask, other=float("-inf")).to(tl.float32)
    x = tl.exp(x - tl.max(x, 0))
    probability = x / tl.sum(x, 0)
    # One number that orders (probability, then lowest expert). A NaN is above all, so that the
    # index stays one of an expert, and the weight tells.
    bits = probability.to(tl.int32, bitcast=True)
    bits = tl.where(probability != probability, 0x7FC00000, bits)
    left = tl.where(mask, (bits.to(tl.int64) << 32) | (BLOCK - 1 - expert), -1)
    rank = tl.arange(0, K_BLOCK)
    chosen = tl.zeros((K_BLOCK,), dtype=tl.float32)
    index = tl.full((K_BLOCK,), BLOCK, dtype=tl.int32)
    tot = 0.0
    for i in tl.static_range(TOP_K):
        best = tl.max(left, 0)
        value = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        chosen = tl.where(rank == i, value, chosen)
        index = tl.where(rank == i, BLOCK - 1 - (best & (BLOCK - 1)).to(tl.int32), index)
        left = tl.where(left == best, -1, left)
        tot += value
    if NORMALISE:
        chosen = chosen / tot
    is_chosen = rank < TOP_K
    slot = rank
    if ALONE:
        slot = tl.sum((index[None, :] < index[:, None]).to(tl.int32), 1)
        tl.store(token_ptr + rank, tl.zeros((K_BLOCK,), dtype=tl.int64), is_chosen)
        tl.store(place_ptr + rank, rank.to(tl.int64), is_chosen)
        ends = tl.sum((index[None, :] <= expert[:, None]).to(tl.int32), 1)
        tl.store(ends_ptr + expert, ends, mask)
    tl.store(index_ptr + token * TOP_K + slot, index.to(tl.int64), is_chosen)
    tl.store(weights_ptr + token * TOP_K + slot, chosen.to(weights_ptr.dtype.element_ty), is_chosen)


@triton.jit(do_not_specialize=["tokens"])
def _route_kernel(
    index_ptr, weights_ptr, token_ptr, expert_ptr, place_ptr, sorted_ptr, ends_ptr, tokens, E,
    TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A pair's row is the number of pairs before it: of lower experts, or the same and earlier.

    A program writes what one expert's pairs need, and so that every place is written takes an index
    of no expert for the nearest.
    """
    follow(PDL)
    expert = tl.program_id(0)
    token = tl.arange(0, TOKENS)[:, None]
    slot = tl.arange(0, K_BLOCK)[None, :]
    mask = (token < tokens) & (slot < TOP_K)
    pair = token * TOP_K + slot
    index = tl.load(index_ptr + pair, mask, other=E)
    index = tl.where(mask, tl.minimum(tl.maximum(index, 0), E - 1), E).to(tl.int32)
    is_own = index == expert
    own = is_own.to(tl.int32)
    lower = tl.sum((index < expert).to(tl.int32), 1)  # [TOKENS]
    owned = tl.sum(own, 1)
    first = tl.sum(lower, 0)
    earlier = tl.cumsum(own, 1) - own  # of the token's own pairs
    row = first + (tl.cumsum(owned, 0) - owned)[:, None] + earlier
    place = token * TOP_K + lower[:, None] + earlier
    tl.store(token_ptr + row, (token + tl.zeros_like(row)).to(tl.int64), is_own)
    tl.store(expert_ptr + row, (expert + tl.zeros_like(row)).to(tl.int64), is_own)
    tl.store(place_ptr + place, row.to(tl.int64), is_own)
    tl.store(sorted_ptr + place, tl.load(weights_ptr + pair, is_own, other=0.0), is_own)
    tl.store(ends_ptr + expert, first + tl.sum(owned, 0))


def choose(logits: torch.Tensor, k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts of each token: logits [T, E] -> weights [T, k], index [T, k] int64."""
    logits, weights, index = _outputs(logits, k)
    if len(logits):
        _launch_choose(logits, weights, index, index, index, index, normalise, is_alone=False)
    return weights, index


def choose_routes(logits: torch.Tensor, k: int, normalise: bool) -> Routes:
    """The routes of the experts that `choose` chooses; for one token in one launch."""
    tokens, experts = logits.shape
    if tokens != 1:
        weights, index = choose(logits, k, normalise)
        return route(index, weights, experts)
    logits, weights, index = _outputs(logits, k)
    token, place = torch.empty_like(index[0]), torch.empty_like(index)
    ends = torch.empty(experts, dtype=torch.int32, device=logits.device)
    _launch_choose(logits, weights, index, token, place, ends, normalise, is_alone=True)
    return token, index[0], place, weights, ends


def _outputs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits as the kernel reads them, and room for weights and index; refuses what cannot be."""
    device.require_float("choose", logits)
    tokens, experts = logits.shape
    if not 0 < k <= experts:
        raise ValueError(f"choose cannot take {k} of {experts} experts")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    index = torch.empty((tokens, k), dtype=torch.int64, device=logits.device)
    return logits, logits.new_empty((tokens, k)), index


def _launch_choose(
    logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, token: torch.Tensor,
    place: torch.Tensor, ends: torch.Tensor, normalise: bool, *, is_alone: bool,
) -> None:  # fmt: skip
    (tokens, experts), k = logits.shape, index.shape[1]
    _choose_kernel[(tokens,)](
        logits, weights, index, token, place, ends, experts, logits.stride(0),
        NORMALISE=normalise, ALONE=is_alone, TOP_K=k, K_BLOCK=triton.next_power_of_2(k),
        BLOCK=triton.next_power_of_2(experts), num_warps=4, enable_fp_fusion=False,
        **pdl(logits.device),
    )  # fmt: skip


def route(index: torch.Tensor, weights: torch.Tensor, experts: int) -> Routes:
    """As `ops.experts.route_op`: one launch for few tokens, sorts for many; integers either way."""
    if index.numel() > MOST_COUNTED:
        return route_by_sorting(index, weights, experts)
    tokens, k = index.shape
    token, expert = index.new_empty((2, tokens * k), dtype=torch.int64)
    place, ordered = torch.empty_like(index, dtype=torch.int64), torch.empty_like(weights)
    ends = torch.empty(experts, dtype=torch.int32, device=index.device)
    _route_kernel[(experts,)](
        index.contiguous(), weights.contiguous(), token, expert, place, ordered, ends, tokens,
        experts, TOP_K=k, K_BLOCK=triton.next_power_of_2(k), TOKENS=_room(tokens), num_warps=4,
        enable_fp_fusion=False, **pdl(index.device),
    )  # fmt: skip
    return token, expert, place, ordered, ends


def _room(tokens: int) -> int:
    """Powers of four, so that few kernels are compiled."""
    room = 16
    while room < tokens:
        room *= 4
    return room
