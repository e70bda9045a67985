"""What the stages of vLLM's plug-in say of their rows: a control must have failed."""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.engines.measures import CACHE_BYTES, SHAPES, Measures
from bench.engines.planted import _then
from bench.engines.plugin import Session
from bench.engines.stages import MODES, STAGES
from bench.engines.verdicts import MOST_ON_RANKS, exit_code, read_rows, verdicts

KERNELS = Path(__file__).parents[3] / "kernels"


def row(mode, measure, value="", batch="", **more):
    found = dict.fromkeys(("nth", "differ", "n"), "") | {"p50": "1", "p99": "1"} | more
    text = {name: str(each) for name, each in found.items()}
    return {
        "model": "m", "mode": mode, "measure": measure, "batch": str(batch), "value": str(value),
        **text,
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
        row(m, "requests_s", 99 if m == "ndcheck" else 1, 1000, nth=0) for m in ("ndcheck", "stock")
    ]
    rows += [row(m, "requests_s", 5, 1000, nth=1) for m in ("ndcheck", "stock")]
    rows += [
        row("ndcheck", "closed_tokens_per_s", 96, 1),
        row("stock", "closed_tokens_per_s", 100, 1),
    ]
    assert [verdict.state for verdict in verdicts(rows)] == ["met", "met", "met", "missed"]


@pytest.mark.parametrize(("p50", "p99", "states"), [
    (1.03, 1.03, ["met", "met"]), (1.04, 1.0, ["missed", "met"]), (1.0, 1.04, ["met", "missed"]),
])  # fmt: skip
def test_latencies_are_held_to_stocks_too(p50, p99, states):
    rows = [row("ndcheck", "closed_tokens_per_s", 100, 8, p50=p50, p99=p99)]
    rows += [row("stock", "closed_tokens_per_s", 100, 8)]
    *found, throughput = verdicts(rows)
    assert [verdict.state for verdict in found] == states
    assert throughput.state == "met"


@pytest.mark.parametrize(
    ("changes", "states"),
    [
        ({}, ["met"] * 4),
        ({"unset": "other"}, ["met", "missed", "met", "met"]),
        ({"ndcheck": "own"}, ["met", "untested", "untested", "untested"]),
        ({"stock-asked": "own"}, ["missed", "met", "met", "met"]),
    ],
)
def test_where_the_plug_in_must_not_act_every_bit_is_vllms(changes, states):
    digests = {
        "stock": "s", "stock-asked": "s", "ndcheck": "n", **dict.fromkeys(
            ("vllm", "unset", "uninstalled", "unknown-version"), "own"
        ),
    } | changes  # fmt: skip
    rows = [row(mode, "digest", value, n=int(mode == "ndcheck")) for mode, value in digests.items()]
    assert [verdict.state for verdict in verdicts(rows)] == states


def test_a_plug_in_that_was_there_after_all_shows_nothing_of_its_absence():
    rows = [row("vllm", "digest", "own", n=0), row("uninstalled", "digest", "own", n=1)]
    assert [verdict.state for verdict in verdicts(rows)] == ["missed"]


@pytest.mark.parametrize(
    ("measure", "value", "state"),
    [
        ("refusal", "CoverageError: ndcheck: nothing covers model.layers.0.mixer (Linear)", "met"),
        ("refusal", "OutOfMemoryError: mixer", "missed"),
        ("start_s", "20", "missed"),
    ],
)
def test_a_planted_fault_must_be_refused_for_what_it_is(measure, value, state):
    rows = [row("ndcheck", "start_s", 20), row("uncovered-layer", measure, value)]
    assert [verdict.state for verdict in verdicts(rows)] == [state]


def test_completions_of_a_long_load_must_not_differ():
    rows = [
        row("ndcheck", "long_s", 50, 1000, differ=0),
        row("stock", "long_s", 50, 1000, differ=3),
    ]
    assert [verdict.state for verdict in verdicts(rows)] == ["met", "met"]
    rows[0]["differ"] = "1"
    assert [verdict.state for verdict in verdicts(rows)] == ["missed", "met"]


def test_nothing_seen_is_not_a_pass(tmp_path):
    assert exit_code(verdicts(read_rows(tmp_path, "8b"))) == 3


@pytest.mark.parametrize(
    ("stages", "said"),
    [("8b,9b", "9b: choose from 8b,"), ("8b+fp8", "8b+fp8: only run, run8b, planted, smollm2 run")],
)
def test_stages_that_cannot_be_run_are_refused_in_one_line(tmp_path, stages, said):
    run = subprocess.run(
        [sys.executable, "-m", "bench.engines.plugin", str(tmp_path), "--stages", stages],
        cwd=KERNELS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert f"--stages {said}" in run.stderr


def test_every_stage_can_be_run():
    for stage in STAGES.values():
        engines = {mode: [m for m, by in stage.engines if by == mode] for _, mode in stage.engines}
        assert set(engines) <= set(MODES)
        for model, mode in stage.engines:
            assert model == "smollm2" or (SHAPES / model / "config.json").is_file()
            assert mode in MODES
            assert CACHE_BYTES[model]
        for model, measure, modes in stage.measures:
            assert callable(getattr(Measures, measure))
            assert all(model in engines[mode] for mode in modes)


def test_time_that_is_over_ends_what_runs(tmp_path):
    session = Session(tmp_path, tmp_path, 0)
    process = session.start(["http.server", "0"], tmp_path / "log", {})
    assert session.left(100) == 0
    session.end_all()
    assert process.returncode == -signal.SIGKILL


def test_a_planted_fault_keeps_the_parameters_that_the_plug_in_looks_for():
    def load_model(self, *, load_dummy_weights=False):
        self.loaded = load_dummy_weights

    worker = SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: seen))
    seen, altered = object(), []
    planted = _then(load_model, altered.append)
    assert inspect.signature(planted) == inspect.signature(load_model)
    planted(worker, load_dummy_weights=True)
    assert worker.loaded is True
    assert altered == [seen]
