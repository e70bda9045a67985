"""In which order an op adds, by the number of rows it is given at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ndcheck.errors import BackendError
from ndcheck.explain.reductions import ColumnSums, Reduction, RowSums, Shape
from ndcheck.explain.sumtree import NotASumError, Pair, SumTree, read_tree
from ndcheck.records import Arm

# A unit, and a mask that swallows any sum of units in the widest accumulator the dtype meets.
UNITS = {
    torch.float32: (1.0, 2.0**127),
    torch.bfloat16: (1.0, 2.0**127),
    torch.float16: (2.0**-24, 2.0**15),
}
# Counts of units that the dtype holds exactly: more terms are read a part at a time.
LARGEST_COUNT = {torch.float32: 2**24, torch.bfloat16: 2**8, torch.float16: 2**11}
N_WATCHED_ROWS = 16
N_WATCHED_COLUMNS = 3
N_TRIES = 64
MOST_TERMS_BY_ROW = 512
Evidence = Literal["confirmed", "unconfirmed", "not checked"]


@dataclass(frozen=True, slots=True)
class Order:
    """One order of addition, and the output elements [row, column] that were seen to have it.

    ``evidence`` is whether the tree, computed in software on random operands, gives the op's bits;
    ``reason`` says more.
    """

    tree: SumTree
    elements: tuple[tuple[int, int], ...]
    evidence: Evidence
    reason: str


@dataclass(frozen=True, slots=True)
class OrderPoint:
    """The orders found at one number of rows and reduced length; more than one: elements differ."""

    rows: int
    terms: int
    orders: tuple[Order, ...]
    n_elements: int
    n_calls: int
    is_repeatable: bool

    @property
    def row_classes(self) -> tuple[tuple[str, ...], ...]:
        """The distinct orders of a row, each the digests of its columns' trees, in row order."""
        digests: dict[int, dict[int, str]] = {}
        for order in self.orders:
            for row, column in order.elements:
                digests.setdefault(row, {})[column] = order.tree.digest
        rows = (
            tuple(columns[c] for c in sorted(columns)) for _, columns in sorted(digests.items())
        )
        return tuple(dict.fromkeys(rows))


def sweep(
    reduction: Reduction,
    shape: Shape,
    points: Sequence[tuple[int, int]],
    arm: Arm = "stock",
    on_point: Callable[[OrderPoint], None] = lambda point: None,
) -> list[OrderPoint]:
    """The orders at every (rows, terms) of ``points``.

    Raises NotASumError where the op is not a sum of its terms, and BackendError where the
    invariant arm computed nothing.
    """
    found = []
    for rows, terms in points:
        with torch.inference_mode(), kernels(arm):
            point = read_orders(_reader(reduction, rows, replace(shape, terms=terms)))
        found.append(point)
        on_point(point)
    return found


def _reader(reduction: Reduction, n_rows: int, shape: Shape) -> Reader:
    if reduction.columns is not None and shape.terms > MOST_TERMS_BY_ROW:
        return ColumnReader(reduction.columns, n_rows, shape)
    return RowReader(reduction.make(shape), n_rows, shape, is_mean=reduction.is_mean)


def kernels(arm: Arm) -> AbstractContextManager[object]:
    """The scope of an arm's kernels. Raises BackendError at its end if no override ran."""
    return nullcontext() if arm == "stock" else _invariant()


@contextmanager
def _invariant() -> Iterator[None]:
    import ndcheck_kernels

    try:
        with ndcheck_kernels.invariant_kernels() as scope:
            yield
    except ndcheck_kernels.UncoveredOpError as error:
        raise BackendError(f"invariant arm: {error}") from error
    if not scope.fires:
        raise BackendError("invariant arm: no override ran, so this would have been stock")


def read_orders(reader: Reader) -> OrderPoint:
    """Every order found among the watched output elements, by FPRev and checked in software."""
    left = set(range(len(reader.elements)))
    orders = []
    while left:
        watched = min(left)
        reader.dissenters = set()
        tree = read_tree(reader.n_terms, partial(reader.sizes, watched))
        alike = sorted(left - reader.dissenters)
        evidence, reason = check(tree, reader, watched)
        elements = tuple(reader.elements[e] for e in alike)
        orders.append(Order(tree, elements, evidence, reason))
        left -= set(alike)
    return OrderPoint(
        reader.n_rows,
        reader.n_terms,
        tuple(orders),
        len(reader.elements),
        reader.n_calls,
        reader.repeats(),
    )


class Reader(ABC):
    """Probes one op at one number of rows; every row gets the same terms.

    ``elements`` are the output elements [row, column] that are watched.
    """

    def __init__(self, n_rows: int, shape: Shape, *, is_mean: bool) -> None:
        self.n_rows = n_rows
        self.n_terms = shape.terms
        self.is_mean = is_mean
        self.n_calls = 0
        self.dissenters: set[int] = set()
        self.elements: list[tuple[int, int]] = []
        self._shape = shape
        self._unit, self._mask = UNITS[shape.dtype]
        # The quotient of a mean is rounded again: half the count leaves room for that.
        self._part = LARGEST_COUNT[shape.dtype] // (2 if is_mean else 1)
        self._first: tuple[list[Pair], NDArray[np.int64]] | None = None

    def sizes(self, watched: int, pairs: Sequence[Pair]) -> list[int]:
        """Subtree sizes at the watched element; elements that read otherwise are noted."""
        readings = self._read(pairs)
        differ = (readings != readings[:, watched : watched + 1]).any(axis=0)
        self.dissenters |= set(np.flatnonzero(differ).tolist())
        if self._first is None:
            self._first = list(pairs), readings
        return [int(size) for size in readings[:, watched]]

    def repeats(self) -> bool:
        """Whether the first readings come out the same again."""
        return self._first is None or bool((self._read(self._first[0]) == self._first[1]).all())

    def random_sums(self, seed: int, element: int) -> tuple[NDArray[np.float32], Tensor]:
        """Random terms [n], exact in fp32, and the op's result for them at one element."""
        generator = torch.Generator().manual_seed(seed)
        half = torch.randn(self.n_terms // 2, generator=generator)
        half *= torch.exp2(torch.randint(-6, 7, half.shape, generator=generator))
        # Terms that cancel: what is left of their sum is the rounding noise of its order.
        terms = torch.cat([half, -half, half[: self.n_terms % 2]]).to(self._shape.dtype)
        terms = terms[torch.randperm(self.n_terms, generator=generator)]
        return terms.float().numpy(), self._sums(terms.to(self._shape.device))[element].cpu()

    def _read(self, pairs: Sequence[Pair]) -> NDArray[np.int64]:
        """Subtree sizes [pairs, elements]."""
        factor = (self.n_terms if self.is_mean else 1) / self._unit
        total: Tensor | float = 0.0
        for start in range(0, self.n_terms, self._part):
            units = slice(start, start + self._part)
            total = total + (self._masked_sums(pairs, units).double() * factor).round()
        readings = torch.as_tensor(total).cpu().numpy()
        unlikely = readings[~((readings >= 0) & (readings <= self.n_terms - 2))]
        if unlikely.size:
            raise NotASumError(
                f"not a plain sum of its terms: a reading counts {unlikely[0]:g} of {self.n_terms}"
            )
        return self.n_terms - readings.astype(np.int64)

    @abstractmethod
    def _sums(self, terms: Tensor) -> Tensor:
        """The sums [elements] of the same terms [n] in every row and column."""

    @abstractmethod
    def _masked_sums(self, pairs: Sequence[Pair], units: slice) -> Tensor:
        """The sums [pairs, elements] of ones at ``units``, but +M and -M at each pair."""


class RowReader(Reader):
    """One call for each pair: all columns of a row get the same terms."""

    def __init__(self, row_sums: RowSums, n_rows: int, shape: Shape, *, is_mean: bool) -> None:
        super().__init__(n_rows, shape, is_mean=is_mean)
        self._row_sums = row_sums
        self._x = torch.empty(n_rows, shape.terms, dtype=shape.dtype, device=shape.device)
        n_columns = self._count_columns()
        self.elements = [
            (row, column)
            for row in _spread(n_rows, N_WATCHED_ROWS)
            for column in _spread(n_columns, N_WATCHED_COLUMNS)
        ]
        index = torch.tensor(self.elements, device=shape.device)
        self._index = index[:, 0] * n_columns + index[:, 1]

    def _sums(self, terms: Tensor) -> Tensor:
        self._x[:] = terms
        return self._call()

    def _masked_sums(self, pairs: Sequence[Pair], units: slice) -> Tensor:
        sums = []
        for i, j in pairs:
            self._x.zero_()
            self._x[:, units] = self._unit
            self._x[:, i] = self._mask
            self._x[:, j] = -self._mask
            sums.append(self._call())
        return torch.stack(sums)

    def _call(self) -> Tensor:
        self.n_calls += 1
        return self._row_sums(self._x).reshape(-1)[self._index]

    def _count_columns(self) -> int:
        self._x.fill_(self._unit)
        out = self._row_sums(self._x)
        if out.dim() == 0 or out.shape[0] != self.n_rows:
            raise NotASumError(
                f"of {self.n_rows} rows it made an output of shape {list(out.shape)}: "
                "it must return one or more sums for each row"
            )
        return out.reshape(self.n_rows, -1).shape[1]


class ColumnReader(Reader):
    """A product's columns hold a pair each, so that one call reads as many pairs as it has.

    Takes for granted that all columns are summed alike; every reading is taken a second time in
    columns half the width away, and NotASumError raised where that makes a difference.
    """

    def __init__(self, product: ColumnSums, n_rows: int, shape: Shape) -> None:
        super().__init__(n_rows, shape, is_mean=False)
        self._product = product
        rows = _spread(n_rows, N_WATCHED_ROWS)
        self.elements = [(row, 0) for row in rows]
        self._rows = torch.tensor(rows, device=shape.device)
        self._terms = torch.empty(
            shape.terms, shape.columns, dtype=shape.dtype, device=shape.device
        )

    def _sums(self, terms: Tensor) -> Tensor:
        self._terms[:] = terms[:, None]
        return self._call()[:, 0]

    def _masked_sums(self, pairs: Sequence[Pair], units: slice) -> Tensor:
        width = self._shape.columns
        sums = []
        for start in range(0, len(pairs), width):
            chunk = torch.tensor(pairs[start : start + width], device=self._shape.device)
            both = []
            for shift in (0, width // 2):
                columns = (torch.arange(len(chunk), device=chunk.device) + shift) % width
                self._terms.zero_()
                self._terms[units] = self._unit
                self._terms[chunk[:, 0], columns] = self._mask
                self._terms[chunk[:, 1], columns] = -self._mask
                both.append(self._call()[:, columns].T)
            if not torch.equal(*both):
                raise NotASumError(
                    "columns of this product are summed in orders of their own: read them one by "
                    f"one, with up to {MOST_TERMS_BY_ROW} --terms"
                )
            sums.append(both[0])
        return torch.cat(sums)

    def _call(self) -> Tensor:
        self.n_calls += 1
        return self._product(self.n_rows, self._terms)[self._rows]


def check(tree: SumTree, reader: Reader, element: int) -> tuple[Evidence, str]:
    """Whether ``tree`` computes the op's bits on random terms.

    The mirrored tree is the control: if it does so too, the terms could not tell orders apart.
    """
    if tree.largest_fan_in > 2:
        return "not checked", f"hardware fuses additions of {tree.largest_fan_in} terms"
    mirrored = tree.mirrored()
    n_told_apart = 0
    for seed in range(N_TRIES):
        terms, seen = reader.random_sums(seed, element)
        if not any(torch.equal(seen, sum_) for sum_ in _finished(tree, terms, seen, reader)):
            or_else = ", or a quotient is rounded otherwise" if reader.is_mean else ""
            reason = f"another result in random trial {seed + 1} of {N_TRIES}{or_else}"
            return "unconfirmed", reason
        n_told_apart += all(
            not torch.equal(seen, sum_) for sum_ in _finished(mirrored, terms, seen, reader)
        )
    if mirrored.digest != tree.digest and not n_told_apart:
        return "not checked", f"the mirrored order gives the same bits in {N_TRIES} random trials"
    return "confirmed", (
        f"bit for bit in {N_TRIES} random trials; the mirrored tree failed {n_told_apart} of them"
    )


def _finished(
    tree: SumTree, terms: NDArray[np.float32], like: Tensor, reader: Reader
) -> list[Tensor]:
    """The tree's sum rounded once to the op's dtype; of a mean, every way to divide it."""
    n = np.float32(len(terms))
    if not reader.is_mean:
        sums = [tree.evaluate(terms)]
    else:
        total = tree.evaluate(terms)
        sums = [total / n, total * (1 / n), tree.evaluate(terms * (1 / n))]
    return [torch.tensor(sum_).to(like.dtype) for sum_ in sums]


def _spread(count: int, most: int) -> list[int]:
    """Up to ``most`` indices below ``count``, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def depends_on_rows(points: Sequence[OrderPoint]) -> bool:
    """Whether a row's order follows the number of rows or its place, or changes by itself."""
    classes: dict[int, set[tuple[str, ...]]] = {}
    for point in points:
        classes.setdefault(point.terms, set()).update(point.row_classes)
    return any(len(found) > 1 for found in classes.values()) or not all(
        point.is_repeatable for point in points
    )


def switch_points(points: Sequence[OrderPoint]) -> list[OrderPoint]:
    """The points whose orders are not those of the point before, at the same length."""
    return [b for a, b in pairwise(points) if a.terms == b.terms and a.row_classes != b.row_classes]
