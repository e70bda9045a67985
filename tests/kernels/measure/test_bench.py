"""Timing both arms: what runs where, and the arithmetic of a cell."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from ndcheck_kernels import active_scope
from ndcheck_kernels.measure import bench, timing
from ndcheck_kernels.measure.bench import Ceilings, OverrideMissedError, time_case
from ndcheck_kernels.measure.cases import timed_cases
from ndcheck_kernels.measure.cases.products import products

CPU = torch.device("cpu")
LINEAR = products(32, 64)[0]
CEILING = Ceilings(copy_gb_per_s=10, mm_tflop_per_s=0.1)


def test_a_cell_is_the_ratio_and_the_share_of_the_nearer_ceiling(monkeypatch):
    monkeypatch.setattr(bench, "medians_us", lambda *a, **k: {"ours": 2.0, "stock": 3.0})
    few, many = time_case(LINEAR, torch.bfloat16, CPU, (1, 256), CEILING)
    assert (few.ratio, few.us, few.stock_us, few.m) == (1.5, 2.0, 3.0, 1)
    n_bytes = 2 * (64 + 32 * 64 + 32 + 32)  # x, w, the case's bias, the result
    assert few.gb_per_s == pytest.approx(n_bytes / 2 / 1e3)
    assert few.tflop_per_s == pytest.approx(2 * 32 * 64 / 2 / 1e6)
    assert (few.bound, few.share_of_ceiling) == ("memory", pytest.approx(few.gb_per_s / 10))
    assert (many.bound, many.share_of_ceiling) == ("compute", pytest.approx(many.tflop_per_s / 0.1))


def test_the_arms_run_inside_and_outside_the_scope(monkeypatch):
    seen = {"ours": set(), "stock": set()}

    def medians_us(variants, device_type, scopes):
        for name, launches in variants.items():
            with scopes[name]() if name in scopes else contextmanager(lambda: iter([0]))():
                launches[0]()
                seen[name].add(active_scope() is not None)
        return {"ours": 1.0, "stock": 1.0}

    monkeypatch.setattr(bench, "medians_us", medians_us)
    list(time_case(LINEAR, torch.bfloat16, CPU, (3,), CEILING))
    assert seen == {"ours": {True}, "stock": {False}}


def test_stock_is_never_timed_as_ours():
    with pytest.raises(OverrideMissedError, match="linear"):
        list(time_case(replace(LINEAR, fires="bmm"), torch.bfloat16, CPU, (1,), CEILING))


def test_rows_beyond_the_limit_are_left_out():
    limited = replace(LINEAR, max_rows=1)
    assert [cell.m for cell in time_case(limited, torch.bfloat16, CPU, (1, 2), CEILING)] == [1]


def test_variants_take_turns_in_their_scopes(monkeypatch):
    monkeypatch.setitem(timing._BLOCKS, "cpu", timing._Block(100, 3))
    log = []

    @contextmanager
    def scope():
        log.append("enter")
        yield
        log.append("leave")

    variants = {"a": [lambda: log.append("a")], "b": [lambda: log.append("b")]}
    times = timing.medians_us(variants, "cpu", {"a": scope})
    assert set(times) == {"a", "b"}
    assert min(times.values()) > 0
    turn = ["enter", "a", "a", "a", "leave", "b", "b", "b"]
    assert log[-len(turn) * (timing.REPLAYS + 1) :] == turn * (timing.REPLAYS + 1)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_operands_rotate_until_they_fill_the_cache(device_type):
    size = timing.ROTATED_BYTES[device_type] / 4
    assert timing.copies(size, device_type) == 4
    assert timing.copies(1, device_type) == timing.MOST_COPIES
    assert timing.copies(1e12, device_type) == 1


def test_timed_ops_are_all_there():
    assert {case.op for case in timed_cases("cpu")} == set(bench_ops())
    assert {case.op for case in timed_cases("cuda")} == set(bench_ops())


def bench_ops():
    from ndcheck_kernels.measure.cases import TIMED

    return TIMED
