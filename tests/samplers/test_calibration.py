"""The time of a plan, against a machine whose clock the test turns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ndcheck.plan.trials import plan_trials
from ndcheck.records import RunSpec
from ndcheck.request import make_spec
from ndcheck.samplers import calibration
from ndcheck.samplers.calibration import estimate
from ndcheck.samplers.local import backend
from ndcheck.samplers.local.backend import LocalBackend

STATES = ("whole", "chunked")


class Machine:
    """Takes seconds by a law; what a batch size costs once, it costs once."""

    def __init__(self, per_step_s=0.001):
        self.now_s = 0.0
        self.per_step_s = per_step_s
        self._seen = set()

    def clock(self):
        return self.now_s

    def sample(self, trial, probe, decoding):
        rows = trial.load.batch_size
        if (trial.arm, rows) not in self._seen:
            self._seen.add((trial.arm, rows))
            self.now_s += 0.5
        slower = 2 if trial.arm == "invariant" else 1
        self.now_s += 0.02 + rows * 0.003
        self.now_s += decoding.max_tokens * slower * self.per_step_s * (4 + rows)
        return []


@pytest.fixture
def planned() -> tuple[RunSpec, list]:
    spec = make_spec(loads=[1, 2, 4, 8, 16], samples=60, max_tokens=50)
    return spec, plan_trials(spec, {"p1": 4}, 2048, None, STATES)


def test_a_cost_in_a_straight_line_is_found_exactly(planned):
    spec, trials = planned
    trial_run = Machine()
    found = estimate(spec, trials, trial_run, trial_run.clock)
    run = Machine()
    for trial in trials:
        run.sample(trial, spec.probes[0], spec.decoding)
    assert found.elapsed_s == pytest.approx(run.now_s)
    assert found.measured_s == pytest.approx(trial_run.now_s)
    assert found.measured_s < found.elapsed_s / 2
    assert not found.is_least


def test_where_time_runs_out_the_largest_batch_is_not_tried(planned):
    spec, trials = planned
    machine = Machine(per_step_s=calibration.BUDGET_S)
    found = estimate(spec, trials, machine, machine.clock)
    assert found.is_least
    run = Machine(per_step_s=calibration.BUDGET_S)
    for trial in trials:
        run.sample(trial, spec.probes[0], spec.decoding)
    assert found.elapsed_s < run.now_s


def test_one_token_costs_what_it_takes(planned):
    spec, trials = planned
    spec = replace(spec, decoding=replace(spec.decoding, max_tokens=1))
    machine, run = Machine(), Machine()
    for trial in trials:
        run.sample(trial, spec.probes[0], spec.decoding)
    assert estimate(spec, trials, machine, machine.clock).elapsed_s == pytest.approx(run.now_s)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"loads": "auto"}, None),
        ({"batching": "continuous"}, "only exact batches in one process"),
        ({"random_weights": 1}, "no weights are made"),
    ],
)
def test_what_a_plan_times(options, reason):
    said = LocalBackend().untimed(make_spec(**options))
    assert said is None if reason is None else reason in said


def test_weights_of_gigabytes_are_not_loaded_for_a_plan(monkeypatch):
    monkeypatch.setattr(backend, "MOST_BYTES_LOADED", 1 << 20)
    assert "0.0 GB of weights are not loaded" in LocalBackend().untimed(make_spec())
