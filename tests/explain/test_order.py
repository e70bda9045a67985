"""Orders read from real ops: checked against their own bits, and against planted orders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ndcheck.errors import UsageError
from ndcheck.explain.order import (
    ColumnReader,
    RowReader,
    depends_on_rows,
    read_orders,
    sweep,
    switch_points,
)
from ndcheck.explain.order_report import (
    distinct_orders,
    dot,
    order_document,
    order_lines,
    svg,
)
from ndcheck.explain.reductions import REDUCTIONS, Reduction, Shape, load_function
from ndcheck.explain.sumtree import NotASumError

CPU = torch.device("cpu")
FP32 = Shape(48, 32, torch.float32, CPU)


def read(function, rows, shape=FP32, arm="stock", is_mean=False):
    reduction = Reduction("planted", "rows", lambda shape: function, is_mean)
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


def test_a_fixed_order_is_not_accused():
    points = read(lambda x: in_order(x, range(x.shape[1])), [1, 2, 4])
    assert not depends_on_rows(points)
    assert next(order_lines("planted", "rows", points, 80)).startswith("FIXED")


def test_rows_of_one_call_that_differ_are_found():
    def last_row_differs(x):
        n = x.shape[1]
        return torch.cat([in_order(x[:-1], range(n)), in_order(x[-1:], range(n - 1, -1, -1))])

    points = read(last_row_differs, [4])
    assert len(points[0].orders) == 2
    assert depends_on_rows(points)
    assert "rows of one call differ" in next(order_lines("planted", "rows", points, 80))


def test_an_order_that_changes_by_itself_is_found():
    shape = Shape(12, 1, torch.float32, CPU)
    n_calls, n_steady_calls = 0, 10**9

    def flaky(x):
        nonlocal n_calls
        n_calls += 1
        n = x.shape[1]
        return in_order(x, range(n) if n_calls <= n_steady_calls else range(n - 1, -1, -1))

    (steady,) = read(flaky, [1], shape)
    assert steady.is_repeatable
    # The last calls of a reading repeat its first ones.
    n_steady_calls, n_calls = n_calls - 5, 0
    points = read(flaky, [1], shape)
    assert not points[0].is_repeatable
    assert depends_on_rows(points)


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
    with pytest.raises(NotASumError):
        read(function, [2])


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


def test_functions_are_loaded_from_modules_and_files(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_planted_sums.py").write_text("def total(x):\n    return x.sum(-1)\n")
    for path in ("my_planted_sums:total", f"{tmp_path}/my_planted_sums.py:total"):
        assert load_function(path).name == "total"
    for path in ("my_planted_sums:absent", "absent_module:f", "nothing"):
        with pytest.raises(UsageError, match="--fn"):
            load_function(path)


@pytest.mark.parametrize("name", ["linear", "mm"])
def test_reading_by_columns_gives_the_same_orders(name):
    shape = Shape(80, 40, torch.float32, CPU)
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

    with pytest.raises(NotASumError, match="columns"):
        read_orders(ColumnReader(product, 2, Shape(16, 8, torch.float32, CPU)))
