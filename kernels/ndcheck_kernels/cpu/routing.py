"""Routing on CPU: which experts a token chooses, and the return of their outputs to it.

Computes: topk, whose ties go to the lowest index; a token's outputs times their weights, added; and
    index_add where no row is added to twice.
Reduction order: outputs in the order given, in float32 (float64 for float64), rounded once.
Depends on: the row alone.
Dtypes: those of the op.
Not claimed: the order of ties in topk over more than `MOST_CANDIDATES`; there torch's own choice
    among equals, a function of the row too, stands.
"""

import torch

from ndcheck_kernels.ops.experts import combine_op, route_by_sorting, route_op
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import implements

aten = torch.ops.aten

# Routers choose among hundreds. Sorting a vocabulary would take too long.
MOST_CANDIDATES = 1024


@implements(aten.topk.default, device="cpu")
def topk(
    x: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest (smallest) along a dim, in order, with their places."""
    if x.dim() == 0 or x.shape[dim] > MOST_CANDIDATES or k > x.shape[dim]:
        return torch.topk(x, k, dim, largest, sorted)
    values, places = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k).contiguous(), places.narrow(dim, 0, k).contiguous()


implements(route_op, device="cpu")(route_by_sorting)


@implements(combine_op, device="cpu")
def combine_experts(rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[P, H], [T, k], [T, k] -> [T, H]: each token's rows, weighted."""
    compute = torch.float64 if rows.dtype == torch.float64 else torch.float32
    total = rows.new_zeros(place.shape[0], rows.shape[1], dtype=compute)
    for i in range(place.shape[1]):
        # Two roundings on purpose: torch's addcmul fuses them in some lanes only.
        total += rows[place[:, i]].to(compute) * weights[:, i, None].to(compute)
    return total.to(rows.dtype)


@implements(aten.index_add.default, device="cpu")
def index_add(
    x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, *, alpha: float = 1
) -> torch.Tensor:
    """x with rows of `source` added at `index`, each to a row of its own."""
    if alpha != 1:
        raise UnsupportedCallError("only alpha = 1")
    if source.dtype != x.dtype:
        raise RuntimeError(f"rows of {source.dtype} are added to {x.dtype}")
    if source.shape != (*x.shape[:dim], index.numel(), *x.shape[dim:][1:]):
        raise RuntimeError(f"{list(source.shape)} are no {index.numel()} rows of dim {dim}")
    if index.unique().numel() != index.numel():
        raise UnsupportedCallError("several rows are added to one, in an order nobody promises")
    return x.index_copy(dim, index, x.index_select(dim, index) + source)
