"""Layers of a model that several ranks share, with sums in an order that is fixed beforehand.

A *rank* is one of the processes that share a model. transformers' tensor-parallel plan says how
each layer is cut: by its output features (`colwise`), by its input features (`rowwise`), or, for
experts, by their hidden features (`moe_tp_experts`). In the last two cases every rank computes a
part of a sum.

Stock rounds the parts to the model's dtype and adds them in an order that the collective chooses.
Here they stay in fp32, and `rank_sum_op` adds neighbouring ranks first, then neighbouring pairs.

With `groups`, a power of two, the bits are the same on 1, 2, 4, ... `groups` ranks:

- Input features are cut into `groups` parts, each a product of its own. The parts are added
  pairwise, as a tree; a rank that holds several parts holds a whole branch of that tree.
- Output features are computed in `groups` blocks of one width, because the order in which a
  product adds may depend on how wide it is.
- Attention stays as it is: each head is computed whole on one rank.

FP8 weights in blocks are cut between blocks only, so that a row's scales are those of one rank.
FP8 with one scale a row is refused.

On CUDA, `decoder` runs whole layers in this way, fused.
"""

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ndcheck_kernels.models.interface import here
from ndcheck_kernels.models.quantised import is_block_fp8, is_row_fp8
from ndcheck_kernels.models.weight_only import WeightOnlyLinear
from ndcheck_kernels.ops import block_fp8
from ndcheck_kernels.ops.collectives import (
    add_pairwise,
    known_ranks,
    rank_gather_op,
    rank_sum_op,
)
from ndcheck_kernels.ops.experts import combine_op, route_op
from ndcheck_kernels.ops.products import partial_grouped_op, partial_linear_op
from ndcheck_kernels.scope.refusal import UncoveredOpError, refusal

aten = torch.ops.aten

_GATHERED = frozenset({"colwise_gather_output", "colwise_rep"})
_VOCABULARY = frozenset({"embedding_rowwise", "rowwise"})  # As transformers 5.18 and 5.17 call it.
# In these a rank's forward needs nothing of another rank. Any other style calls a collective of
# torch's, which a scope refuses.
REPLICATED = frozenset({"replicated_with_grad_allreduce", "replicate"})
_LOCAL = REPLICATED | {"colwise", "packed_colwise"}


@dataclass(frozen=True)
class Spread:
    """How a model is spread over ranks."""

    n_ranks: int
    rank: int
    """Which of them this process is, from 0."""
    group: str
    """The name of torch's process group; empty with one rank."""
    groups: int
    """Into how many parts every sum is cut, over all ranks."""
    is_nested: bool
    """Whether the bits have to be those of other numbers of ranks too."""

    @property
    def n_parts(self) -> int:
        """How many of the parts are this rank's."""
        return self.groups // self.n_ranks

    def sum(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The sum of all ranks' parts, of which ``parts`` are this rank's; fp32 (fp64 for fp64)."""
        own = add_pairwise(parts)
        if self.n_ranks == 1:
            return own
        total: torch.Tensor = rank_sum_op(own, self.group)
        return total


_spreads: weakref.WeakKeyDictionary[torch.nn.Module, Spread] = weakref.WeakKeyDictionary()


def spread_of(model: torch.nn.Module) -> Spread | None:
    """How `ordered_layers` spreads it now; None outside of that, and for one whole sum."""
    return _spreads.get(model)


@contextmanager
def ordered_layers(model: Any, groups: int | None = None) -> Iterator[None]:
    """Compute the layers that a transformers model's plan cuts as this module says.

    ``groups`` None: the bits belong to the number of ranks that share the model. On leaving, the
    model has its own forwards again. Raises ValueError unless ``groups`` is a power of two that the
    number of ranks divides; UncoveredOpError, naming the module, where a layer's size does not
    divide into parts or, with ``groups``, for a style of plan that is not known here.
    """
    n_ranks = getattr(model, "_tp_size", None) or 1
    if n_ranks == 1 and groups is None:
        yield
        return
    if groups is not None and (groups & (groups - 1) or groups % n_ranks):
        raise ValueError(f"groups {groups}: give a power of two that {n_ranks} ranks divide")
    if n_ranks == 1:
        with _replaced(model, Spread(1, 0, "", groups or 1, True)):
            yield
        return
    mesh = model._device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    with known_ranks(group) as name:
        spread = Spread(n_ranks, group.rank(), name, groups or n_ranks, groups is not None)
        with _replaced(model, spread):
            yield


@contextmanager
def _replaced(model: Any, spread: Spread) -> Iterator[None]:
    replaced = [
        (layer, layer.__dict__.get("forward"), forward)
        for path, layer, style in _planned(model)
        if (forward := _ordered(layer, path, style, spread))
    ]
    _spreads[model] = spread
    try:
        for layer, _, forward in replaced:
            layer.forward = forward
        yield
    finally:
        del _spreads[model]
        for layer, own, _ in replaced:
            del layer.forward  # The class's own shows again,
            if own is not None:
                layer.forward = own  # or what transformers had put over it.


def _planned(model: Any) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Path, module and style of every module that the model's plan names."""
    plan = getattr(model, "tp_plan", None) or {}
    for path, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        if style is not None:
            yield path, module, style


def is_shared(model: torch.nn.Module) -> bool:
    """Whether ranks share it, each with a part of some parameters."""
    return any(hasattr(p, "device_mesh") for p in model.parameters())


def styles(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """The style in which the model's plan cuts a module, of all that it names."""
    return {module: style for _, module, style in _planned(model)}


def _ordered(
    layer: Any, path: str, style: str, spread: Spread
) -> Callable[..., torch.Tensor] | None:
    """The forward that takes the place of the layer's own; None where its own is right."""
    if is_row_fp8(layer):
        raise _refusal(layer, path, "a row's FP8 scale spans the parts of all ranks")
    if isinstance(layer, WeightOnlyLinear):
        raise _refusal(layer, path, "weights of integers are not cut into parts")
    if isinstance(layer, torch.nn.Embedding) and style in _VOCABULARY:
        return partial(_look_up, layer, spread) if spread.n_ranks > 1 else None
    if style == "rowwise":
        _check_divides(layer, path, layer.in_features, spread)
        return partial(_sum_inputs, layer, spread)
    if style == "moe_tp_experts":
        _check_experts(layer, path)
        _check_divides(layer, path, layer.intermediate_dim, spread)
        return partial(_run_experts, layer, spread)
    is_cut_fp8 = style == "colwise" and is_block_fp8(layer)
    if style in _GATHERED or (style == "colwise" and spread.is_nested) or is_cut_fp8:
        if spread.is_nested or is_cut_fp8:
            _check_divides(layer, path, layer.out_features, spread)
        return partial(_run_blocks, layer, spread, style in _GATHERED)
    if spread.is_nested and style not in _LOCAL:
        raise _refusal(layer, path, f"its plan, {style}, has no order that other ranks share")
    return None


def _look_up(layer: Any, spread: Spread, ids: torch.Tensor) -> torch.Tensor:
    """An embedding of which this rank holds some rows: ids [...] -> [..., H].

    Exact: one rank has the row, and all others add 0.
    """
    weight = here(layer.weight)
    own = ids - spread.rank * -(-layer.num_embeddings // spread.n_ranks)
    is_elsewhere = (own < 0) | (own >= weight.shape[0])
    rows = F.embedding(own.masked_fill(is_elsewhere, 0), weight)
    rows = rows.masked_fill(is_elsewhere[..., None], 0)
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return spread.sum([wide]).to(rows.dtype)


def _sum_inputs(layer: Any, spread: Spread, x: torch.Tensor) -> torch.Tensor:
    """A linear layer of which this rank holds some input features: x [..., K here] -> [..., N]."""
    length = layer.in_features // spread.groups
    parts = x.reshape(-1, x.shape[-1]).split(length, -1)
    weights = here(layer.weight).split(length, 1)
    if is_block_fp8(layer):
        scales = here(layer.weight_scale_inv).split(length // block_fp8.BLOCK, 1)
        pieces = zip(parts, weights, scales, strict=True)
        total = spread.sum([block_fp8.partial_linear_op(*piece) for piece in pieces])
    else:
        pairs = zip(parts, weights, strict=True)
        total = spread.sum([partial_linear_op(part, weight) for part, weight in pairs])
    if layer.bias is not None:
        total = total + here(layer.bias)
    return total.to(x.dtype).view(*x.shape[:-1], -1)


def _run_blocks(layer: Any, spread: Spread, gathers: bool, x: torch.Tensor) -> torch.Tensor:
    """A linear layer of which this rank holds some output features, in blocks of one width."""
    weight = here(layer.weight)
    width = layer.out_features // spread.groups if spread.is_nested else weight.shape[0]
    weights = weight.split(width)
    biases = [None] * len(weights) if layer.bias is None else here(layer.bias).split(width)
    if is_block_fp8(layer):
        scales = here(layer.weight_scale_inv).split(-(-width // block_fp8.BLOCK))
        blocks = zip(weights, scales, biases, strict=True)
        out = torch.cat([block_fp8.linear_op(x, *block) for block in blocks], -1)
    else:
        out = torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)
    if gathers and spread.n_ranks > 1:
        out = rank_gather_op(out, layer.out_features, spread.group)
    return out


def _run_experts(
    layer: Any, spread: Spread, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Experts of which this rank holds some hidden features: x [T, H], both others [T, k]."""
    gate_up, down = here(layer.gate_up_proj), here(layer.down_proj)  # [E, 2I, H], [E, H, I]
    token, _, place, ordered, ends = route_op(index, weights, layer.num_experts)
    length = layer.intermediate_dim // spread.groups
    width = length if spread.is_nested else gate_up.shape[1]
    blocks, pieces, rows = gate_up.split(width, 1), down.split(length, 2), x[token]
    if is_block_fp8(layer):
        gate_up_scales = here(layer.gate_up_proj_scale_inv).split(width // block_fp8.BLOCK, 1)
        down_scales = here(layer.down_proj_scale_inv).split(length // block_fp8.BLOCK, 2)
        # CUDA's kernel reads experts that follow one another; a rank's whole share does.
        hidden = [
            block_fp8.grouped_op(rows, block.contiguous(), scales, ends)
            for block, scales in zip(blocks, gate_up_scales, strict=True)
        ]
        parts = layer._apply_gate(torch.cat(hidden, -1)).split(length, -1)
        outputs = [
            block_fp8.partial_grouped_op(part, weight, scales, ends)
            for part, weight, scales in zip(parts, pieces, down_scales, strict=True)
        ]
    else:
        hidden = [aten._grouped_mm.default(rows, block.transpose(1, 2), ends) for block in blocks]
        parts = layer._apply_gate(torch.cat(hidden, -1)).split(length, -1)
        outputs = [
            partial_grouped_op(part, weight.transpose(1, 2), ends)
            for part, weight in zip(parts, pieces, strict=True)
        ]
    total = spread.sum([combine_op(output, place, ordered) for output in outputs])
    return total.to(x.dtype)


def _check_divides(layer: Any, path: str, size: int, spread: Spread) -> None:
    if size % spread.groups:
        raise _refusal(layer, path, f"{size} features do not divide into {spread.groups} parts")
    if is_block_fp8(layer) and size // spread.groups % block_fp8.BLOCK:
        reason = f"{size} features in {spread.groups} parts cut blocks of {block_fp8.BLOCK} in two"
        raise _refusal(layer, path, reason)


def _check_experts(layer: Any, path: str) -> None:
    plain = layer.has_gate and layer.is_concatenated and not layer.is_transposed
    if not plain or layer.has_bias or getattr(layer, "has_post_expert_norm", False):
        raise _refusal(layer, path, "experts with biases, norms or this layout are not spread here")


def _refusal(layer: Any, path: str, reason: str) -> UncoveredOpError:
    parameter = next(layer.parameters())
    module = f"{path} ({type(layer).__name__})"
    error = refusal("tensor-parallel layer", parameter.dtype, parameter.device.type, reason)
    return UncoveredOpError(error.op, error.dtype, error.device, module, reason)
