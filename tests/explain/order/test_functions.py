"""Functions of a user's: what changes from call to call, or is no function of rows, or leaves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ndcheck.errors import UsageError
from ndcheck.explain.order.orders import depends_on_rows, sweep
from ndcheck.explain.order.reductions import Reduction, Shape, load_function
from ndcheck.reports.explain.order import order_lines

CPU = torch.device("cpu")
FP32 = Shape(48, 32, torch.float32, CPU)


def read(function, rows, shape=FP32):
    reduction = Reduction("planted", "rows", lambda shape: function, is_own=False)
    return sweep(reduction, shape, [(n, shape.terms) for n in rows])


def in_order(x, columns):
    total = x[:, columns[0]].clone()
    for column in columns[1:]:
        total = total + x[:, column]
    return total[:, None]


def sequential(x):
    return in_order(x, range(x.shape[1]))[:, 0]


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_results_that_change_from_call_to_call_are_no_order(period):
    n_calls = 0

    def turning(x):
        nonlocal n_calls
        n_calls += 1
        return sequential(x if n_calls // period % 2 else x.flip(1))

    (point,) = read(turning, [2], Shape(24, 1, torch.float32, CPU))
    assert not point.is_known
    assert not point.is_repeatable
    assert next(order_lines("planted", "rows", [point], 80)).startswith("VARIES  the result")


def in_halves(x):
    """Its own mirror image, and unchanged where leaves move on by one, as of lanes in a warp."""
    while x.shape[1] > 1:
        x = x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]
    return x[:, 0]


def test_an_order_that_is_its_own_mirror_image_has_a_control():
    (point,) = read(in_halves, [3], Shape(32, 1, torch.float32, CPU))
    (order,) = point.orders
    assert order.evidence == "confirmed"
    terms = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    assert (sequential(terms) != in_halves(terms)).float().mean() > 0.5
    n_failed = int(re.search(r"adding one by one failed (\d+) of them", order.reason)[1])
    assert n_failed > 32


def test_no_number_is_no_change_from_call_to_call():
    """In float16 large terms are infinite, and two of them of both signs no number."""
    points = read(lambda x: sequential(x.half()).float(), [1, 3, 8, 33])
    assert all(point.is_repeatable and not point.is_known for point in points)
    assert not depends_on_rows(points)


def test_a_row_of_as_many_sums_as_there_are_rows_is_refused():
    with pytest.raises(UsageError, match="a row has 1 sums at one number of rows, and 2 at 2"):
        read(lambda x: in_order(x, range(x.shape[1])).expand(-1, len(x)), [1, 2])


@pytest.mark.parametrize("period", range(80, 110))
def test_a_rare_change_is_laid_to_no_other_row(period):
    n_calls = 0

    def rare(x):
        nonlocal n_calls
        n_calls += 1
        return sequential(x if n_calls % period else x.flip(1))

    points = read(rare, [2], Shape(12, 1, torch.float32, CPU))
    assert not any("other rows" in (point.problem or "") for point in points)


def test_what_changes_its_shape_later_is_no_crash():
    n_calls = 0

    def shrinking(x):
        nonlocal n_calls
        n_calls += 1
        return sequential(x)[: len(x) if n_calls < 50 else 0]

    (point,) = read(shrinking, [2], Shape(12, 1, torch.float32, CPU))
    assert "float32 [0] on cpu" in (point.problem or "")


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


@pytest.mark.parametrize("n_more", [0, 1, 40])
def test_an_order_that_changes_with_the_calls_is_not_laid_to_the_rows(n_more):
    shape = Shape(12, 1, torch.float32, CPU)
    n_calls, n_before = 0, 10**9

    def flaky(x):
        nonlocal n_calls
        n_calls += 1
        return in_order(x, range(12) if n_calls <= n_before else range(11, -1, -1))

    read(flaky, [1], shape)
    n_before, n_calls = n_calls + n_more, 0
    points = read(flaky, [1, 2, 4], shape)
    first_line = next(order_lines("planted", "rows", points, 80))
    assert first_line.startswith("VARIES  the result changes from call to call")


def test_functions_are_loaded_from_modules_and_files(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_planted_sums.py").write_text("def total(x):\n    return x.sum(-1)\n")
    for path in ("my_planted_sums:total", f"{tmp_path}/my_planted_sums.py:total"):
        assert load_function(path).name == "total"
    for path in ("my_planted_sums:absent", "absent_module:f", "nothing"):
        with pytest.raises(UsageError, match="--fn"):
            load_function(path)


def test_a_function_or_module_that_leaves_python_is_a_usage_error(tmp_path: Path):
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(UsageError, match="--fn"):
        load_function(f"{tmp_path}/leaving.py:f")
    (tmp_path / "left.py").write_text("def f(x):\n    raise SystemExit(0)\n")
    row_sums = load_function(f"{tmp_path}/left.py:f").make(FP32)
    with pytest.raises(UsageError, match="SystemExit"):
        row_sums(torch.ones(1, 48))
