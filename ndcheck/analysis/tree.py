"""The divergence tree: a prefix trie of completions, reduced to the positions where they fork."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ndcheck.analysis.unique import Completions

ENDED = -1
"""Stands for the token of a completion that has none left; token ids are never negative."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One continuation at a fork: ``token_id`` None means that these completions end here.

    ``continuation`` is the decoded text from the fork to the next fork (or to the end).
    ``completion_ids`` are those below this branch, most frequent first.
    """

    token_id: int | None
    token_text: str
    count: int
    continuation: str
    completion_ids: tuple[int, ...]
    fork: Fork | None


@dataclass(frozen=True, slots=True)
class Fork:
    """A token position (0-based) where completions part; branches by count, largest first.

    ``margin`` is the smallest top-1 minus top-2 logit seen there on the most frequent branch.
    """

    position: int
    n_samples: int
    margin: float | None
    branches: Sequence[Branch]


def build_tree(completions: Completions) -> Fork | None:
    """The first fork, or None where all completions agree.

    A fork's branches, and the forks below them, are found when they are looked at: a report
    shows a few branches of what may be a million. Looking at all of them is linear in tokens.
    """
    return _find_fork(completions, np.arange(len(completions)), 0)


class Branches(Sequence[Branch]):
    """The branches of one fork, each built when it is looked at."""

    def __init__(
        self, completions: Completions, members: list[NDArray[np.int64]], position: int
    ) -> None:
        """``members`` holds, per branch, the indices of its completions, ascending."""
        self._completions = completions
        self._members = members
        self._position = position

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, index: int) -> Branch: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Branch, ...]: ...
    def __getitem__(self, index: int | slice) -> Branch | tuple[Branch, ...]:
        if isinstance(index, slice):
            return tuple(map(self._build, self._members[index]))
        return self._build(self._members[index])

    def __iter__(self) -> Iterator[Branch]:
        return map(self._build, self._members)

    def _build(self, members: NDArray[np.int64]) -> Branch:
        fork = _find_fork(self._completions, members, self._position)
        first = int(members[0])
        texts = self._completions.token_texts(
            first, self._position, fork.position if fork else None
        )
        token_ids = self._completions.token_ids(first)[self._position : self._position + 1]
        return Branch(
            token_id=int(token_ids[0]) if len(token_ids) else None,
            token_text=texts[0] if texts else "",
            count=int(self._completions.counts[members].sum()),
            continuation="".join(texts),
            completion_ids=tuple((members + 1).tolist()),
            fork=fork,
        )


def _find_fork(completions: Completions, members: NDArray[np.int64], start: int) -> Fork | None:
    """Where ``members`` part; they are known to share their first ``start`` tokens."""
    if len(members) < 2:
        return None
    position = _shared_prefix(completions, members, start)
    offsets = completions.starts[members] + position
    going_on = completions.lengths[members] > position
    tokens = np.full(len(members), ENDED)
    tokens[going_on] = completions.tokens[offsets[going_on]]

    # A stable sort keeps each branch's completions in their order, most frequent first.
    order = np.argsort(tokens, kind="stable")
    starts = np.flatnonzero(np.diff(tokens[order], prepend=ENDED - 1))
    counts = np.add.reduceat(completions.counts[members[order]], starts)
    branches = np.split(order, starts[1:])
    by_count = [branches[i] for i in np.argsort(-counts, kind="stable")]

    margin = None
    largest = by_count[0]
    if going_on[largest[0]]:
        seen = completions.margins[offsets[largest][offsets[largest] < len(completions.margins)]]
        seen = seen[np.isfinite(seen)]
        margin = float(seen.min()) if len(seen) else None
    return Fork(
        position=position,
        n_samples=int(counts.sum()),
        margin=margin,
        branches=Branches(completions, [members[branch] for branch in by_count], position),
    )


def _shared_prefix(completions: Completions, members: NDArray[np.int64], start: int) -> int:
    """Length of the longest common prefix of ``members``, known to be at least ``start``."""
    starts = completions.starts[members][:, np.newaxis]
    end = int(completions.lengths[members].min())
    # Blocks that double stay within twice the tokens that are shared, and within a few megabytes.
    width, widest = 16, max(1, 2**20 // len(members))
    while start < end:
        stop = min(start + min(width, widest), end)
        block = completions.tokens[starts + np.arange(start, stop)]
        differs = (block != block[0]).any(axis=0)
        if differs.any():
            return start + int(differs.argmax())
        start, width = stop, 2 * width
    return end
