"""The bits of an op: the same operands everywhere, and every change in its result seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ndcheck_kernels.measure import decode_repeats, manifest
from ndcheck_kernels.measure.cases import FixedSource, manifest_cases

CPU = torch.device("cpu")
ROWS = (1, 3, 16, 17, 33)


def finalise(number: int) -> int:
    """MurmurHash3's 32-bit finaliser, from its reference implementation."""
    h = number & 0xFFFFFFFF
    h ^= h >> 16
    h = h * 0x85EBCA6B & 0xFFFFFFFF
    h ^= h >> 13
    h = h * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


def test_draws_are_integer_arithmetic():
    source = FixedSource(torch.float32, CPU, seed=3)
    first = 3 << 40
    want = [finalise(n ^ n >> 32) for n in range(first, first + 12)]
    assert source._bits((3, 4)).flatten().tolist() == want
    after = [finalise(n ^ n >> 32) for n in range(first + 12, first + 17)]
    assert source._bits((5,)).tolist() == after
    assert finalise(1) == 0x514E28B7  # as published


def test_draws_look_random_enough():
    source = FixedSource(torch.float32, CPU)
    normal = source.normal(20000)
    assert abs(normal.mean()) < 0.05
    assert 1.1 < normal.std() < 1.2
    assert source.order(1000).sort().values.tolist() == list(range(1000))
    assert set(source.integers(1000).tolist()) == {-2, -1, 0, 1, 2}
    rows = source.cancelling(4, 64)
    assert rows.double().sum(-1).tolist() == [0.0] * 4


@pytest.fixture
def linear():
    return next(case for case in manifest_cases("cpu") if case.op == "linear")


def take(case, arm="stock", repeats=2):
    return manifest.take(case, torch.float32, CPU, arm, ROWS, repeats)


def test_the_invariant_arm_has_one_class_and_a_planted_one_two(linear):
    entry = take(linear, "invariant")
    assert len({point.bits for point in entry.points}) == 1
    assert all(point.is_uniform and not point.differing for point in entry.points)
    assert entry.shows_order
    planted = replace(linear, call=lambda x, *o: linear.grouped(1 + 2 * (len(x) >= 17), x, *o))
    bits = [point.bits for point in take(planted).points]
    assert len(set(bits[3:])) == 1
    assert not set(bits[:3]) & set(bits[3:])


def test_a_row_whose_copies_differ_is_seen(linear):
    def call(x, *fixed):
        y = linear.call(x, *fixed)
        if len(y) > 17:
            y[17:] += 1.0
        return y

    assert [point.is_uniform for point in take(replace(linear, call=call)).points] == [
        True, True, True, True, False,
    ]  # fmt: skip


def test_calls_that_do_not_repeat_are_counted(linear):
    calls = []

    def call(x, *fixed):
        calls.append(len(x))
        return linear.call(x, *fixed) + (len(x) == 16) * (len(calls) % 2)

    points = {
        point.m: point.differing for point in take(replace(linear, call=call), "stock", 4).points
    }
    assert points[16] == 2
    assert sum(points.values()) == 2


def test_operands_that_cannot_tell_are_said_to(linear):
    blind = replace(linear, grouped=lambda groups, *o: linear.call(*o))
    assert not take(blind).shows_order


def test_what_is_refused_has_its_refusal(linear):
    refused = replace(linear, call=lambda x, *_: torch.fft.fft(x).real)
    entry = take(refused, "invariant")
    assert "no batch-invariant" in entry.refusal
    assert entry.points == ()


def test_a_decode_step_repeats_and_the_planted_one_does_not():
    steps = list(decode_repeats.repeat_steps(CPU, torch.bfloat16, 60.0, (129,), (2,)))
    control, *rest = steps
    assert (control.form, control.differing) == ("control", decode_repeats.REPEATS["cpu"] - 1)
    assert {step.form for step in rest} == {"growing", "static", "sliced"}
    assert all(step.differing == 0 and step.is_uniform for step in rest)
    assert len(rest) == 3 * len(decode_repeats.HEADS)


@pytest.mark.parametrize("form", ["growing", "static", "sliced"])
@pytest.mark.parametrize("keys", [64, 129])
def test_the_forms_are_one_problem_of_which_only_rounding_is_left(form, keys):
    """Each key twice with opposite values: exactly 0; without the twins it is not."""
    q, k, v = decode_repeats._operands((4, 2, 16), keys, 2, torch.float32, CPU)
    step, _ = decode_repeats.FORMS[form](q, k, v)
    assert step().abs().max() < 1e-5 * v.abs().max()
    step, _ = decode_repeats.FORMS[form](q, k, v.abs())
    assert step().abs().max() > 1e-2 * v.abs().max()


def test_time_that_is_over_ends_the_steps():
    assert [s.form for s in decode_repeats.repeat_steps(CPU, torch.bfloat16, 0.0)] == ["control"]
