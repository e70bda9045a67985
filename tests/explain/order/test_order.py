"""Orders read from real ops: checked against their own bits, and against planted orders."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndcheck.explain.order.orders import depends_on_rows, read_orders, sweep, switch_points
from ndcheck.explain.order.readers import ColumnReader, RowReader
from ndcheck.explain.order.reductions import REDUCTIONS, Reduction, Shape
from ndcheck.explain.order.sumtree import SumTree
from ndcheck.reports.explain.order import (
    distinct_orders,
    dot,
    known_orders,
    order_document,
    order_lines,
    svg,
)

CPU = torch.device("cpu")
FP32 = Shape(48, 32, torch.float32, CPU)


def read(function, rows, shape=FP32, arm="stock", is_mean=False):
    reduction = Reduction("planted", "rows", lambda shape: function, is_mean, is_own=False)
    return sweep(reduction, shape, [(n, shape.terms) for n in rows], arm)


def in_order(x, columns):
    total = x[:, columns[0]].clone()
    for column in columns[1:]:
        total = total + x[:, column]
    return total[:, None]


def follows_rows(x):
    n = x.shape[1]
    return in_order(x, range(n)) if len(x) < 4 else in_order(x, range(n - 1, -1, -1))


def test_a_planted_order_is_read_and_confirmed(trees):
    (point,) = read(lambda x: in_order(x, range(x.shape[1])), [3])
    (order,) = point.orders
    assert order.tree.digest == trees.in_order(48).digest
    assert order.evidence == "confirmed"
    assert point.n_elements == len(order.elements) == 3


def test_an_order_that_follows_the_rows_is_found_where_it_switches(trees):
    points = read(follows_rows, [1, 2, 3, 4, 5])
    assert depends_on_rows(points)
    assert [point.rows for point in switch_points(points)] == [4]
    assert set(distinct_orders(points)) == {
        trees.in_order(48).digest,
        trees.backwards(48).digest,
    }
    text = "\n".join(order_lines("planted", "rows", points, 80))
    assert text.startswith("VARIES  the order of addition changes at rows = 4\n")
    assert "1-3            48  A" in text


@pytest.mark.parametrize("row", [1, 30, 62])
def test_a_single_row_with_an_order_of_its_own_is_found_among_many(row, trees):
    def follows_place(x):
        sums = in_order(x, range(x.shape[1]))
        sums[row] = in_order(x[row : row + 1], range(x.shape[1] - 1, -1, -1))[0]
        return sums

    (point,) = points = read(follows_place, [64])
    assert depends_on_rows(points)
    orders = {order.tree.digest: order.elements for order in point.orders}
    assert orders.keys() == {trees.in_order(48).digest, trees.backwards(48).digest}
    assert orders[trees.backwards(48).digest] == ((row, 0),)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x.mean(0, keepdim=True).expand_as(x),
        lambda x: x.flip(0),
        lambda x: x[torch.tensor([0, 0, *range(2, len(x))][: len(x)])],
    ],
)
def test_sums_of_other_rows_are_no_sums_of_a_row(mixed):
    alone, batch = read(lambda x: in_order(mixed(x), range(x.shape[1])), [1, 4])
    assert alone.orders[0].evidence == "confirmed"
    assert not batch.orders
    assert "follows the other rows" in batch.problem


@st.composite
def sum_trees(draw, n):
    """Any order of n - 1 additions."""
    nodes, left = [], list(range(n))
    while len(left) > 1:
        a = left.pop(draw(st.integers(0, len(left) - 1)))
        b = left.pop(draw(st.integers(0, len(left) - 1)))
        nodes.append((a, b))
        left.append(n + len(nodes) - 1)
    return SumTree(n, tuple(nodes))


def adding_in(tree, dtype=torch.float32):
    def row_sums(x):
        values = list(x.to(dtype).T)
        for a, b in tree.nodes:
            values.append(values[a] + values[b])
        return values[-1].to(x.dtype)

    return row_sums


SMALL = Shape(9, 1, torch.float32, CPU)
few = settings(max_examples=25, deadline=None)


@few
@given(sum_trees(9), sum_trees(9), st.integers(2, 5))
def test_any_order_is_read_confirmed_and_told_from_another_where_it_switches(tree, other, at):
    first, second = adding_in(tree), adding_in(other)
    points = read(lambda x: first(x) if len(x) < at else second(x), range(1, 7), SMALL)
    assert all(order.evidence == "confirmed" for point in points for order in point.orders)
    digests = [point.orders[0].tree.digest for point in points]
    assert digests == [tree.digest] * (at - 1) + [other.digest] * (7 - at)
    differ = tree.digest != other.digest
    assert depends_on_rows(points) == differ
    assert [point.rows for point in switch_points(points)] == [at] * differ


@few
@given(sum_trees(9), st.integers(2, 5))
def test_other_rounding_in_the_same_order_is_seen_and_not_called_confirmed(tree, at):
    """The tree is the same at all numbers of rows; what is added in float64 has other bits."""
    single, double = adding_in(tree), adding_in(tree, torch.float64)
    points = read(lambda x: single(x) if len(x) < at else double(x), range(1, 7), SMALL)
    assert depends_on_rows(points)
    assert [point.rows for point in switch_points(points)] == [at]
    assert [point.is_known for point in points] == [True] * (at - 1) + [False] * (7 - at)
    text = "\n".join(order_lines("planted", "rows", points, 80))
    assert "confirmed at 1-" in text or "confirmed at 1 rows" in text
    assert "confirmed at 1-6" not in text
    assert "adds in float64" in " ".join(text.split())
    assert len(known_orders(points)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_rounded_at_each_addition_are_confirmed_as_such(trees, dtype):
    tree = trees.lanes(24, 4)
    (point,) = read(adding_in(tree, dtype), [2], Shape(24, 1, dtype, CPU))
    (order,) = point.orders
    assert order.tree.digest == tree.digest
    assert order.evidence == "confirmed"
    assert "at each addition" in order.reason


def in_halves(terms):
    total = torch.zeros(())
    for half in terms.tensor_split(2):
        total = total + sequential(half[None])[0] if len(half) else total
    return total


def sequential(x):
    return in_order(x, range(x.shape[1]))[:, 0]


def kahan(x):
    total, rest = torch.zeros(len(x)), torch.zeros(len(x))
    for i in range(x.shape[1]):
        term = x[:, i] - rest
        new = total + term
        total, rest = new, (new - total) - term
    return total


NO_PLAIN_SUMS = {
    "mean": lambda x: sequential(x) / x.shape[1],
    "maximum": lambda x: x.amax(-1),
    "scaled": lambda x: sequential(x * 2),
    "scaled and back": lambda x: sequential(x * 0.1) * 10,
    "weighted": lambda x: sequential(x * torch.linspace(1, 2, x.shape[1])),
    "clamped": lambda x: sequential(x.clamp(-1e30, 1e30)),
    "clamped small": lambda x: sequential(x.clamp(-5, 5)),
    "clamped result": lambda x: sequential(x).clamp(-1e6, 1e6),
    "a subset": lambda x: sequential(x[:, 1:]),
    "one term twice": lambda x: sequential(x) + x[:, 3],
    "offset": lambda x: sequential(x) + 1e-3,
    "sorted": lambda x: sequential(x.sort(-1).values),
    "sorted by size": lambda x: sequential(x.gather(1, x.abs().argsort(-1))),
    "positive first": lambda x: sequential(x.clamp(min=0)) + sequential(x.clamp(max=0)),
    "by size": lambda x: sequential(x if x.abs().max() < 1e5 else x.flip(1)),
    "without zeros": lambda x: torch.stack([in_halves(row[row != 0]) for row in x]),
    "where none is negative": lambda x: sequential(x.flip(1) if (x >= 0).all() else x),
    "where none is positive": lambda x: sequential(x.flip(1) if (x <= 0).all() else x),
    "clamped near the largest": lambda x: sequential(x.clamp(-1e38, 1e38)),
    "complex": lambda x: sequential(x).to(torch.complex64),
    "sparse": lambda x: sequential(x)[:, None].to_sparse(),
    "meta": lambda x: sequential(x).to("meta"),
    "by sign": lambda x: sequential(x if x[0, 0] > 0 else x.flip(1)),
    "float64": lambda x: sequential(x.double()).float(),
    "bfloat16": lambda x: sequential(x.bfloat16()).float(),
    "compensated": kahan,
    "exact": lambda x: torch.tensor([math.fsum(row) for row in x.tolist()]),
    "a root": lambda x: x.square().sum(-1).sqrt(),
    "no tensor": lambda x: 3.0,
}


@pytest.mark.parametrize("name", NO_PLAIN_SUMS)
def test_what_is_no_plain_sum_is_never_drawn(name):
    points = read(NO_PLAIN_SUMS[name], [1, 2, 4], Shape(24, 1, torch.float32, CPU))
    assert not depends_on_rows(points)
    assert not any(point.is_known for point in points)
    assert all(point.doubt for point in points)
    assert known_orders(points) == {}
    text = "\n".join(order_lines("planted", "rows", points, 80))
    assert text.startswith("INCONCLUSIVE")
    assert "confirmed" not in text
    assert "in order" not in text
    document = order_document({}, points)
    assert all(order["nodes"] is None for order in document["orders"])
    assert all(point["problem"] for point in document["points"])


def test_what_is_no_sum_at_some_numbers_of_rows_is_known_at_the_others():
    points = read(lambda x: sequential(x if len(x) < 4 else x[:, 1:]), [1, 3, 4, 6])
    assert [point.is_known for point in points] == [True, True, False, False]
    assert [point.rows for point in switch_points(points)] == [4]


def test_a_fixed_order_is_not_accused():
    points = read(lambda x: in_order(x, range(x.shape[1])), [1, 2, 4])
    assert not depends_on_rows(points)
    assert next(order_lines("planted", "rows", points, 80)).startswith("FIXED")


def test_columns_with_orders_of_their_own_are_not_laid_to_the_rows():
    """More of them than are watched of every row: a row has the same ones whatever their number."""

    def turned(x):
        n = x.shape[1]
        return torch.cat([in_order(x, [(i + turn) % n for i in range(n)]) for turn in range(8)], 1)

    points = read(turned, [1, 2, 5], Shape(24, 8, torch.float32, CPU))
    assert not depends_on_rows(points)
    assert all(point.is_known for point in points)
    assert next(order_lines("planted", "rows", points, 80)).startswith("FIXED")


def test_rows_of_one_call_that_differ_are_found():
    def last_row_differs(x):
        n = x.shape[1]
        return torch.cat([in_order(x[:-1], range(n)), in_order(x[-1:], range(n - 1, -1, -1))])

    points = read(last_row_differs, [4])
    assert len(points[0].orders) == 2
    assert depends_on_rows(points)
    assert "rows of one call differ" in next(order_lines("planted", "rows", points, 80))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.square().sum(-1, keepdim=True),
        lambda x: x.amax(-1, keepdim=True),
        lambda x: x[:, :-1].sum(-1, keepdim=True),
        lambda x: x.sum(),
    ],
)
def test_what_is_no_row_sum_is_refused(function):
    (point,) = read(function, [2])
    assert point.problem
    assert not point.orders


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_more_terms_than_the_dtype_can_count(dtype):
    (point,) = read(
        lambda x: x.float().sum(-1, keepdim=True).to(x.dtype), [1], Shape(300, 1, dtype, CPU)
    )
    (order,) = point.orders
    assert order.tree.n_leaves == 300
    assert order.evidence == "confirmed", order.reason


@pytest.mark.parametrize("name", ["linear", "mm", "sum", "mean", "bmm"])
def test_orders_agree_with_bits(name):
    """Two numbers of rows have one order exactly if random rows get the same bits."""
    shape = Shape(96, 48, torch.float32, CPU)
    rows = [1, 2, 3, 4, 16]
    points = sweep(REDUCTIONS[name], shape, [(n, 96) for n in rows])
    generator = torch.Generator().manual_seed(1)
    terms = torch.randn(1, 96, generator=generator) * torch.exp2(
        torch.randint(-6, 7, (1, 96), generator=generator)
    )
    sums = REDUCTIONS[name].make(shape)
    bits = [sums(terms.expand(n, -1).contiguous())[0] for n in rows]
    for i, point in enumerate(points):
        for j, other in enumerate(points):
            if point.row_classes == other.row_classes and len(point.row_classes) == 1:
                assert torch.equal(bits[i], bits[j]), (name, rows[i], rows[j])
    assert {order.evidence for point in points for order in point.orders} == {"confirmed"}


@pytest.mark.parametrize("name", ["linear", "mm", "attention", "rms_norm"])
def test_invariant_kernels_have_one_order(name):
    shape = Shape(64, 64, torch.float32, CPU)
    points = sweep(REDUCTIONS[name], shape, [(n, 64) for n in (1, 2, 5)], "invariant")
    assert not depends_on_rows(points)
    assert len(distinct_orders(points)) == 1


def test_document_and_drawings_hold_every_order():
    points = read(follows_rows, [1, 4], Shape(6, 1, torch.float32, CPU))
    document = order_document({"op": "planted"}, points)
    assert document["depends_on_rows"] is True
    assert document["switch_points"] == [{"rows": 4, "terms": 6}]
    assert [len(order["nodes"]) for order in document["orders"]] == [5, 5]
    orders = distinct_orders(points)
    assert dot(orders).count("->") == 2 * 10
    assert svg(orders).count("<path") == 2


@pytest.mark.parametrize("name", ["linear", "mm"])
def test_reading_by_columns_gives_the_same_orders(name):
    shape = Shape(80, 32, torch.float32, CPU)
    for rows in (1, 3, 8):
        by_row = RowReader(REDUCTIONS[name].make(shape), rows, shape, is_mean=False)
        by_column = ColumnReader(REDUCTIONS[name].columns, rows, shape)
        found = [read_orders(reader) for reader in (by_row, by_column)]
        assert {digest for classes in found[0].row_classes for digest in classes} == {
            digest for classes in found[1].row_classes for digest in classes
        }
        assert found[1].n_calls < found[0].n_calls
        assert found[1].orders[0].evidence == "confirmed"


def test_columns_summed_in_their_own_orders_are_refused():
    def product(rows, terms):
        half = terms.shape[1] // 2
        backwards = terms[:, half:].flip(0)
        sums = torch.cat([in_order(t.T, range(len(t))) for t in (terms[:, :half], backwards)])
        return sums.T.expand(rows, -1)

    point = read_orders(ColumnReader(product, 2, Shape(16, 8, torch.float32, CPU)))
    assert "columns" in point.problem
