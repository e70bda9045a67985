"""In which order an op adds, by the number of rows it is given at once."""

from __future__ import annotations

import hashlib
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

from ndcheck.errors import BackendError, UsageError
from ndcheck.explain.order.readers import (
    MOST_TERMS_BY_ROW,
    ColumnReader,
    Reader,
    RowReader,
    are_equal,
)
from ndcheck.explain.order.reductions import Reduction, Shape
from ndcheck.explain.order.sumtree import NotASumError, SumTree, UnsteadyError, read_tree
from ndcheck.records import Arm

N_TRIES = 64
N_REPEATED = 16
UNSTEADY = str(UnsteadyError())
MOST_FUSED = 33
"""Terms that a tensor core is known to add in one step, the sum so far among them."""
Evidence = Literal["confirmed", "unconfirmed", "not checked"]
Trials = tuple[NDArray[np.float32], Tensor]
"""Random terms [n, trials], exact in fp32, and the op's results [trials, elements]."""


@dataclass(frozen=True, slots=True)
class Order:
    """One order of addition, and the output elements [row, column] that were seen to have it.

    ``evidence`` is whether the tree, computed in software on random operands, gives the op's bits;
    ``reason`` says more. An unconfirmed one is not the op's order. ``manner`` says how it rounds
    where that is not once, to fp32, after each addition; ``bits`` are a digest of its results on
    operands that are the same at every number of rows.
    """

    tree: SumTree
    elements: tuple[tuple[int, int], ...]
    evidence: Evidence
    reason: str
    manner: str
    bits: str

    @property
    def is_known(self) -> bool:
        return self.evidence != "unconfirmed"

    @property
    def key(self) -> str:
        """Equal where two orders are one: the tree's digest if it was confirmed as it is."""
        if not self.is_known:
            return f"bits {self.bits}"
        rest = self.bits if self.evidence == "not checked" else self.manner
        return f"{self.tree.digest} {rest}".rstrip()


@dataclass(frozen=True, slots=True)
class OrderPoint:
    """The orders found at one number of rows and reduced length; more than one: elements differ.

    ``problem`` says why there is none: what was probed is no sum of its terms, or does not repeat.
    ``bits`` are digests [row][column] of the results on random operands.
    """

    rows: int
    terms: int
    orders: tuple[Order, ...]
    n_elements: int
    n_calls: int
    is_repeatable: bool
    problem: str | None
    bits: tuple[tuple[str, ...], ...]

    @property
    def row_classes(self) -> tuple[tuple[str, ...], ...]:
        """The distinct orders of a row, each the keys of its columns' orders, in row order."""
        keys: dict[int, dict[int, str]] = {}
        for order in self.orders:
            for row, column in order.elements:
                keys.setdefault(row, {})[column] = order.key
        rows = (tuple(columns[c] for c in sorted(columns)) for _, columns in sorted(keys.items()))
        return tuple(dict.fromkeys(rows))

    @property
    def is_known(self) -> bool:
        """Whether every order was found, and none is unconfirmed."""
        return bool(self.orders) and all(order.is_known for order in self.orders)

    @property
    def doubt(self) -> str | None:
        """Why the op's order at this number of rows is not known."""
        unknown = [order.reason for order in self.orders if not order.is_known]
        return self.problem or next(iter(unknown), None)

    def is_like(self, other: OrderPoint) -> bool:
        """Whether a row has the same orders in both, or the same bits where none is known."""
        if self.is_known and other.is_known and self.row_classes != other.row_classes:
            return False
        return self.bits == other.bits


def sweep(
    reduction: Reduction,
    shape: Shape,
    points: Sequence[tuple[int, int]],
    arm: Arm = "stock",
    on_point: Callable[[OrderPoint], None] = lambda point: None,
) -> list[OrderPoint]:
    """The orders at every (rows, terms) of ``points``.

    Raises BackendError where the invariant arm computed nothing, UsageError where a row has more
    sums at some numbers of rows than at others.
    """

    n_columns: dict[int, int] = {}

    def read(rows: int, terms: int) -> OrderPoint:
        with torch.inference_mode(), kernels(arm):
            try:
                reader = _reader(reduction, rows, replace(shape, terms=terms))
                if reader.n_columns != (n := n_columns.setdefault(terms, reader.n_columns)):
                    raise UsageError(
                        f"{reduction.name}: a row has {n} sums at one number of rows, and "
                        f"{reader.n_columns} at {rows}: return as many at each"
                    )
                return read_orders(reader)
            except NotASumError as error:  # of an output's shape, before any result
                return OrderPoint(rows, terms, (), 0, 1, True, str(error), ())

    found = []
    for rows, terms in points:
        found.append(read(rows, terms))
        on_point(found[-1])
    if depends_on_rows(found) and all(point.is_repeatable for point in found):
        # Is it the rows, or how often it was called before?
        first = found[0]
        if read(first.rows, first.terms).bits != first.bits:
            found[0] = replace(first, orders=(), is_repeatable=False, problem=UNSTEADY)
    return found


def _reader(reduction: Reduction, n_rows: int, shape: Shape) -> Reader:
    if reduction.columns is not None and shape.terms > MOST_TERMS_BY_ROW:
        return ColumnReader(reduction.columns, n_rows, shape)
    row_sums = reduction.make(shape)
    can_fuse = reduction.is_own or shape.device.type == "cuda"
    return RowReader(row_sums, n_rows, shape, is_mean=reduction.is_mean, can_fuse=can_fuse)


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
    drawn = [reader.random_sums(seed) for seed in range(N_TRIES)]
    trials = np.stack([terms for terms, _ in drawn], 1), torch.stack([sums for _, sums in drawn])
    is_repeatable = all(
        _digest(reader.random_sums(seed)[1]) == _digest(drawn[seed][1])
        for seed in reversed(range(N_REPEATED))  # not as many calls later each time
    )
    bits = [_digest(column) for column in trials[1].T]
    orders: list[Order] = []
    problem = None
    if not is_repeatable:
        problem = UNSTEADY
    else:
        try:
            reader.check_sums()
            orders = _read_all(reader, trials, bits)
            is_repeatable = reader.repeats()
        except NotASumError as error:
            orders, problem = [], str(error)
            is_repeatable = not isinstance(error, UnsteadyError)
        if _digest(reader.random_sums(0)[1]) != _digest(drawn[0][1]):
            orders, problem, is_repeatable = [], UNSTEADY, False
    by_row: dict[int, list[str]] = {}
    for (row, _), digest in zip(reader.elements, bits, strict=True):
        by_row.setdefault(row, []).append(digest)
    return OrderPoint(
        reader.n_rows,
        reader.n_terms,
        tuple(orders),
        len(reader.elements),
        reader.n_calls,
        is_repeatable,
        problem,
        tuple(dict.fromkeys(map(tuple, by_row.values()))),
    )


def _read_all(reader: Reader, trials: Trials, bits: Sequence[str]) -> list[Order]:
    left = set(range(len(reader.elements)))
    orders = []
    while left:
        watched = min(left)
        reader.dissenters = set()
        tree = read_tree(reader.n_terms, partial(reader.sizes, watched))
        if tree.largest_fan_in > (MOST_FUSED if reader.can_fuse else 2):
            raise NotASumError(
                f"no order of additions: its readings are those of {tree.largest_fan_in} terms "
                "added in one step, as where the order follows the values"
            )
        alike = sorted(e for e in left - reader.dissenters if bits[e] == bits[watched])
        evidence, reason, manner = confirm(tree, reader, trials, watched)
        elements = tuple(reader.elements[e] for e in alike)
        orders.append(Order(tree, elements, evidence, reason, manner, bits[watched]))
        left -= set(alike)
    return orders


def confirm(
    tree: SumTree, reader: Reader, trials: Trials, element: int
) -> tuple[Evidence, str, str]:
    """Whether ``tree`` computes the op's bits on random terms, why, and how it rounds to do so.

    Another tree is the control: if it does so too, the terms could not tell orders apart. It is the
    mirrored one, or where that is the same order, as of pairs, that of the terms one by one.
    """
    if tree.largest_fan_in > 2:
        return "not checked", f"hardware fuses additions of {tree.largest_fan_in} terms", ""
    terms, results = trials
    seen = results[:, element]
    manners = _manners(tree, terms, seen, reader)
    equal = {manner: are_equal(sums, seen).numpy() for manner, sums in manners}
    manner, matches = max(equal.items(), key=lambda item: item[1].sum())
    if not matches.all():
        reason = (
            f"another result in random trial {int((~matches).argmax()) + 1} of {N_TRIES}: it does "
            "more than add these terms in this order, or rounds otherwise"
        )
        return "unconfirmed", reason, ""
    if manner == "float64":
        return "unconfirmed", "it adds in float64, where the order hardly shows in the result", ""
    other, name = tree.mirrored(), "the mirrored tree"
    if other.digest == tree.digest:
        other, name = SumTree.in_order(tree.n_leaves), "adding one by one"
    control = dict(_manners(other, terms, seen, reader))
    n_told_apart = int((~are_equal(control[manner], seen)).sum())
    if other.digest != tree.digest and not n_told_apart:
        return "not checked", f"{name} gives the same bits in {N_TRIES} random trials", manner
    how = f", {manner}" * bool(manner)
    reason = f"bit for bit in {N_TRIES} random trials{how}; {name} failed {n_told_apart} of them"
    return "confirmed", reason, manner


def _manners(
    tree: SumTree, terms: NDArray[np.float32], like: Tensor, reader: Reader
) -> Iterator[tuple[str, Tensor]]:
    """The tree's sums [trials] rounded in every way that an op is known to."""

    def add(values: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(tree.evaluate(values))

    n = np.float32(len(terms))
    if reader.is_mean:
        total = add(terms)
        yield "", (total / float(n)).to(like.dtype)
        yield "the sum times 1/n", (total * float(1 / n)).to(like.dtype)
        yield "the terms times 1/n", add(terms * (1 / n)).to(like.dtype)
        return
    yield "", add(terms).to(like.dtype)
    if like.dtype in (torch.bfloat16, torch.float16):
        rounded = tree.evaluate(torch.from_numpy(terms).to(like.dtype))
        yield f"rounded to {str(like.dtype).removeprefix('torch.')} at each addition", rounded
    yield "float64", torch.from_numpy(tree.evaluate(terms.astype(np.float64))).to(like.dtype)


def _digest(values: Tensor) -> str:
    # The sign and the payload of NaN are no order's.
    wide = torch.where(values.isnan(), torch.nan, values.double())
    return hashlib.blake2b(wide.numpy().tobytes(), digest_size=8).hexdigest()


def depends_on_rows(points: Sequence[OrderPoint]) -> bool:
    """Whether a row's order or bits follow the number of rows or its place, or change by chance."""
    return (
        any(not point.is_repeatable or len(point.bits) > 1 for point in points)
        or any(len(point.row_classes) > 1 and point.is_known for point in points)
        or any(
            a.terms == b.terms and not a.is_like(b)
            for i, a in enumerate(points)
            for b in points[:i]
        )
    )


def switch_points(points: Sequence[OrderPoint]) -> list[OrderPoint]:
    """The points whose orders or bits are not those of the point before, at the same length."""
    return [b for a, b in pairwise(points) if a.terms == b.terms and not a.is_like(b)]
