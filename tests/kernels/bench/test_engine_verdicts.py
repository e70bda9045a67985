"""What the stages of vLLM's plug-in say of their rows: a control must have failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.engines.verdicts import MOST_ON_RANKS, exit_code, read_rows, verdicts

KERNELS = Path(__file__).parents[3] / "kernels"


def row(mode, measure, value="", batch="", nth="", differ=""):
    return {
        "model": "m", "mode": mode, "measure": measure, "batch": str(batch), "nth": str(nth),
        "value": str(value), "differ": str(differ),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "stock", "states", "code"),
    [
        ((0, 0), (3, 900), ["met"], 0),
        ((0, 0), (0, 900), ["met"], 0),  # The logprobs alone show that stock follows the batch.
        ((0, 0), (0, 0), ["untested"], 3),
        ((0, 0), None, ["untested"], 3),
        ((0, 1), (0, 900), ["missed"], 1),
        ((1, 1), (0, 0), ["missed"], 1),
    ],
)
def test_a_needle_that_stock_does_not_lose_either_shows_nothing(ours, stock, states, code):
    rows = [
        row(mode, measure, differ=n)
        for mode, counts in (("ndcheck", ours), ("stock", stock))
        if counts is not None
        for measure, n in zip(("needle", "needle_logprobs"), counts, strict=True)
    ]
    found = verdicts(rows)
    assert [verdict.state for verdict in found] == states
    assert exit_code(found) == code


@pytest.mark.parametrize(("ours", "state"), [(10.2, "met"), (10.3, "missed")])
def test_a_step_is_the_median_of_its_turns_against_stocks(ours, state):
    rows = [row("ndcheck", "step_ms", value, 8) for value in (9, ours, 90)]
    rows += [row("stock", "step_ms", value, 8) for value in (10, 10, 10)]
    (found,) = verdicts(rows)
    assert found.state == state
    rows = [row("ndcheck", "step_ms", ours + 0.25, 8), row("stock", "step_ms", 10, 8)]
    (found,) = verdicts(rows, MOST_ON_RANKS)
    assert found.state == state


def test_a_loads_first_run_warms_up_and_throughput_must_not_fall():
    rows = [
        row(m, "requests_s", 99 if m == "ndcheck" else 1, 1000, 0) for m in ("ndcheck", "stock")
    ]
    rows += [row(m, "requests_s", 5, 1000, 1) for m in ("ndcheck", "stock")]
    rows += [
        row("ndcheck", "closed_tokens_per_s", 96, 1),
        row("stock", "closed_tokens_per_s", 100, 1),
    ]
    assert [verdict.state for verdict in verdicts(rows)] == ["met", "missed"]


def test_nothing_seen_is_not_a_pass(tmp_path):
    assert exit_code(verdicts(read_rows(tmp_path, "8b"))) == 3


def test_an_unknown_stage_is_refused_in_one_line(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "bench.engines.plugin", str(tmp_path), "--stages", "8b,9b"],
        cwd=KERNELS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "--stages 9b: choose from 8b," in run.stderr
