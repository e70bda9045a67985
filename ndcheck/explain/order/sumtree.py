"""The order of a sum as a tree, and how to read it from outside.

The method is FPRev (Xie et al., "FPRev: Revealing Floating-Point Summation Order", USENIX ATC
2025). All terms are 1, but for +M at place i and -M at place j. M is so large that adding 1 to it
changes nothing, so every 1 that is added to either of them is lost until +M and -M meet and cancel.
The result is the number of terms that were added after that: the leaves outside of the subtree in
which i and j first meet. These counts for enough pairs (i, j) give the tree.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ndcheck.errors import BackendError

Pair = tuple[int, int]
Leaves = TypeVar("Leaves", NDArray[np.float32], NDArray[np.float64], Tensor)
MeasureSizes = Callable[[Sequence[Pair]], Sequence[int]]
"""[(i, j), ...] -> number of leaves below the lowest common ancestor of each i and j."""


class NotASumError(BackendError):
    """The readings fit no order of additions: what was probed is not a plain sum."""


class UnsteadyError(NotASumError):
    """There is no order to read: a call that was repeated gave other bits."""

    def __init__(self) -> None:
        super().__init__("the same call gives other bits when it is repeated")


@dataclass(frozen=True)
class SumTree:
    """A sum of leaves 0 .. n_leaves-1.

    ``nodes[k]`` holds what node ``n_leaves + k`` adds: ids of leaves or of earlier nodes. Two are
    an addition, more are added in one fused step. The last node is the root.
    """

    n_leaves: int
    nodes: tuple[tuple[int, ...], ...]

    @property
    def root(self) -> int:
        return self.n_leaves + len(self.nodes) - 1

    @property
    def largest_fan_in(self) -> int:
        """Terms of the widest fused addition; 2 where all are plain."""
        return max(map(len, self.nodes), default=2)

    def children(self, node: int) -> tuple[int, ...]:
        return self.nodes[node - self.n_leaves] if node >= self.n_leaves else ()

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of leaves below each id."""
        sizes = [1] * self.n_leaves
        for children in self.nodes:
            sizes.append(sum(sizes[child] for child in children))
        return sizes

    @functools.cached_property
    def first_leaves(self) -> list[int]:
        """The lowest leaf below each id."""
        first = list(range(self.n_leaves))
        for children in self.nodes:
            first.append(min(first[child] for child in children))
        return first

    @functools.cached_property
    def shapes(self) -> list[str]:
        """A digest of each id's subtree, whatever its place and the order of its operands."""
        first = self.first_leaves
        shapes = [""] * self.n_leaves
        for k, children in enumerate(self.nodes):
            parts = sorted((first[c] - first[self.n_leaves + k], shapes[c]) for c in children)
            shapes.append(hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest())
        return shapes

    @property
    def digest(self) -> str:
        """16 hexadecimal digits, equal where two trees add the same leaves in the same order."""
        return self.shapes[self.root] or "0" * 16

    def evaluate(self, leaves: Leaves) -> Leaves:
        """The sums of ``leaves`` [n_leaves, ...] in this order, each rounded to their dtype.

        Raises ValueError for fused additions, whose rounding only their hardware knows.
        """
        if self.largest_fan_in > 2:
            raise ValueError(f"fused additions of {self.largest_fan_in} terms")
        values: list[Any] = list(leaves)
        for a, b in self.nodes:
            values.append(values[a] + values[b])
        return values[-1]

    @classmethod
    def in_order(cls, n_leaves: int) -> SumTree:
        """The leaves from the first to the last, one by one."""
        nodes = ((n_leaves + i - 1 if i else 0, i + 1) for i in range(n_leaves - 1))
        return cls(n_leaves, tuple(nodes))

    def mirrored(self) -> SumTree:
        """The same shape on reversed leaves: another order, unless it is symmetric."""
        n = self.n_leaves
        return SumTree(
            n,
            tuple(tuple(n - 1 - c if c < n else c for c in children) for children in self.nodes),
        )


def read_tree(n_leaves: int, measure: MeasureSizes, seed: int = 0) -> SumTree:
    """Recover the order of a sum from measured subtree sizes: FPRev's refined algorithm.

    Takes n-1 readings at best. The pivot is drawn, not the first leaf as published, so that a sum
    from the last leaf to the first does not take n(n-1)/2; and parts of one depth are measured
    together, so that a reader can take many at a time.
    Raises NotASumError where the readings contradict each other.
    """
    rng = random.Random(seed)
    parts = [_Part(list(range(n_leaves)))]
    unread = parts
    while unread:
        pairs = []
        for part in unread:
            part.pivot = rng.choice(part.leaves)
            pairs += [(part.pivot, leaf) for leaf in part.leaves if leaf != part.pivot]
        sizes = iter(measure(pairs) if pairs else ())
        found: list[_Part] = []
        for part in unread:
            groups: dict[int, list[int]] = {}
            for leaf in part.leaves:
                if leaf != part.pivot:
                    groups.setdefault(next(sizes), []).append(leaf)
            part.groups = {size: _Part(groups[size]) for size in sorted(groups)}
            found += part.groups.values()
        parts += found
        unread = found
    nodes: list[list[int]] = []
    for part in reversed(parts):  # what a part joins comes after it
        _join(part, n_leaves, nodes)
    if parts[0].size != n_leaves:
        raise NotASumError(f"not a plain sum: only {parts[0].size} of {n_leaves} terms meet")
    return _tree(n_leaves, nodes)


@dataclass(slots=True)
class _Part:
    """Leaves with a subtree of their own, but for operands that a fused addition takes beside.

    ``groups`` are the other leaves by the size of the subtree in which they meet the pivot.
    ``root`` and ``size`` are the id of that subtree and its size in the whole tree.
    """

    leaves: list[int]
    pivot: int = 0
    groups: dict[int, _Part] = field(default_factory=dict)
    root: int = 0
    size: int = 1


def _join(part: _Part, n_leaves: int, nodes: list[list[int]]) -> None:
    """Add the nodes on the way from the part's pivot to its root."""
    part.root = part.pivot
    for size, group in part.groups.items():
        if group.size == len(group.leaves):
            nodes.append([part.root, group.root])
        elif group.size == size:
            # The group's own root is this very addition, which has one more operand. It moves to
            # the end, so that every node comes after its children.
            nodes.append([*nodes[group.root - n_leaves], part.root])
            nodes[group.root - n_leaves] = []
        else:
            raise NotASumError("not a plain sum: its readings contradict each other")
        part.root, part.size = n_leaves + len(nodes) - 1, size


def _tree(n_leaves: int, nodes: list[list[int]]) -> SumTree:
    """Drop nodes emptied on the way, and number the rest in a way that is the tree's alone."""
    first = list(range(n_leaves))
    height = [0] * n_leaves
    for children in nodes:
        first.append(min((first[c] for c in children), default=-1))
        height.append(1 + max((height[c] for c in children), default=0))
    kept = [k for k, children in enumerate(nodes) if children]
    kept.sort(key=lambda k: (height[n_leaves + k], first[n_leaves + k]))
    renamed = {leaf: leaf for leaf in range(n_leaves)}
    renamed |= {n_leaves + k: n_leaves + place for place, k in enumerate(kept)}
    return SumTree(
        n_leaves,
        tuple(tuple(renamed[c] for c in sorted(nodes[k], key=first.__getitem__)) for k in kept),
    )
