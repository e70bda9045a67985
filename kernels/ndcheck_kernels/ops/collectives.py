"""Sums over ranks in one order, whatever the size of the message.

Computes: the sum of one fp32 (fp64) tensor of each rank, or their last dims side by side, on every
    rank.
Reduction order: neighbouring ranks first, then neighbouring pairs, and so on (`add_pairwise`): with
    4 ranks (0 + 1) + (2 + 3). Every element is added whole in one place, so how the message is cut
    up, which follows its size, changes nothing.
Depends on: the number of ranks.
Dtypes: float32, float64; of what is only moved, any.
Not claimed: torch's own collectives, which a scope refuses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ndcheck_kernels.ops.library import declare
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import implements

GATHERED_ELEMENTS = 2**16
"""Up to this size every rank adds all of it, in one round trip; above, more than two ranks each add
a slice, in two: between two, both ways move the same bytes."""

_groups: dict[str, Any] = {}

# The sum of `part` over the ranks of a group, by its name.
rank_sum_op = declare("rank_sum(Tensor part, str group) -> Tensor")
# [..., size] cut into equal pieces, the last one shorter, of which each rank has one.
rank_gather_op = declare("rank_gather(Tensor part, int size, str group) -> Tensor")


def add_pairwise(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their sum, as a tree over neighbours; a part without a neighbour waits for the next level.

    Where the parts of a rank are 1, 2, 4, ... neighbours, the rank's own tree is a branch of the
    whole one: so 8 parts give one sum on 1, 2, 4 or 8 ranks.
    """
    while len(parts) > 1:
        odd = parts[len(parts) // 2 * 2 :]
        parts = [
            *(a + b for a, b in zip(parts[:-1:2], parts[1::2], strict=True)),
            *odd,
        ]
    return parts[0]


def sum_over_ranks(part: torch.Tensor, group: str) -> torch.Tensor:
    """What `rank_sum_op` computes."""
    if part.dtype not in (torch.float32, torch.float64):
        raise UnsupportedCallError(f"ranks add float32 or float64, not {part.dtype}")
    if part.numel() == 0:
        return part
    ranks = _groups[group]
    n_ranks, flat = ranks.size(), part.contiguous().view(-1)
    if adds_whole(part, group):
        return add_pairwise(gather_parts(part, group).unbind())
    slices = torch.nn.functional.pad(flat, (0, -flat.numel() % n_ranks)).view(n_ranks, -1)
    received = torch.empty_like(slices)
    torch.distributed.all_to_all_single(received, slices, group=ranks)
    total = torch.empty_like(slices)
    own = add_pairwise(received.unbind())
    torch.distributed.all_gather(list(total.unbind()), own, group=ranks)
    return total.view(-1)[: flat.numel()].view(part.shape)


def adds_whole(part: torch.Tensor, group: str) -> bool:
    """Whether every rank adds all of a sum of this size."""
    return _groups[group].size() == 2 or part.numel() <= GATHERED_ELEMENTS


def gather_parts(part: torch.Tensor, group: str) -> torch.Tensor:
    """Every rank's part [...], in the order of the ranks: [ranks, ...]."""
    ranks = _groups[group]
    parts = part.new_empty(ranks.size(), *part.shape)
    gather = getattr(torch.distributed, "all_gather_single", None)
    gather = gather or torch.distributed.all_gather_into_tensor  # Its name before torch 2.13.
    gather(parts.view(-1), part.contiguous().view(-1), group=ranks)
    return parts


def _rank_gather(part: torch.Tensor, size: int, group: str) -> torch.Tensor:
    ranks = _groups[group]
    piece = -(-size // ranks.size())
    part = torch.nn.functional.pad(part, (0, piece - part.shape[-1]))
    return torch.cat(gather_parts(part, group).unbind(), -1)[..., :size]


@contextmanager
def known_ranks(group: Any) -> Iterator[str]:
    """Let the ops above find a group of ranks by the name that this yields."""
    _groups[group.group_name] = group
    try:
        yield group.group_name
    finally:
        del _groups[group.group_name]  # One that is kept to the end of the process aborts it.


for _device in ("cpu", "cuda"):
    implements(rank_sum_op, device=_device)(sum_over_ranks)
    implements(rank_gather_op, device=_device)(_rank_gather)
