"""How long a plan takes here, from a few of its trials cut short."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ndcheck.records import Arm, RunSpec, Trial
from ndcheck.samplers.backends import backend_of
from ndcheck.samplers.base import Sampler

N_SHORT, N_LONG = 3, 11
"""Tokens of the short trials. On CUDA both hold an uncaptured step and the capture of another."""
BUDGET_S = 8.0
"""No trial begins after it; one that has begun is finished."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """``is_least``: the largest batch was not tried in time, so it counts as the smallest does."""

    elapsed_s: float
    measured_s: float
    is_least: bool


@dataclass(frozen=True, slots=True)
class _Cost:
    """Of a batch, in seconds: once a process, once a trial, and once a token."""

    n_rows: int
    first_s: float
    start_s: float
    step_s: float

    def of(self, n_tokens: int) -> float:
        return self.start_s + n_tokens * self.step_s


def estimate(
    spec: RunSpec,
    trials: Sequence[Trial],
    sampler: Sampler,
    clock: Callable[[], float] = time.perf_counter,
) -> Estimate:
    """What the trials would take, if every completion were as long as it may be.

    Times the smallest and the largest batch of every arm; between them cost is taken as a straight
    line in the rows. What a run repeats because it diverged comes on top.
    """
    began = clock()
    costs: dict[Arm, list[_Cost]] = {arm: [] for arm in spec.arms}
    is_least = False
    for pick in (min, max):
        for arm, known in costs.items():
            trial = pick(_plain(trials, arm), key=lambda t: t.load.batch_size)
            if known and trial.load.batch_size == known[0].n_rows:
                continue
            if known and clock() - began > BUDGET_S:
                is_least = True
                continue
            known.append(_measure(spec, trial, sampler, clock))
    measured_s = clock() - began
    elapsed_s = dict.fromkeys(spec.arms, 0.0)
    seen: set[tuple[Arm, int]] = set()
    for trial in trials:
        cost = _between(costs[trial.arm], trial.load.batch_size)
        elapsed_s[trial.arm] += cost.of(spec.decoding.max_tokens)
        key = trial.arm, trial.load.batch_size
        if key not in seen:
            elapsed_s[trial.arm] += cost.first_s
        seen.add(key)
    together = max if backend_of(spec).runs_side_by_side(spec) else sum
    return Estimate(together(elapsed_s.values()), measured_s, is_least)


def _plain(trials: Sequence[Trial], arm: Arm) -> list[Trial]:
    of_arm = [t for t in trials if t.arm == arm and t.role != "control"]
    return [t for t in of_arm if t.load.cache_state == "whole"] or of_arm


def _measure(spec: RunSpec, trial: Trial, sampler: Sampler, clock: Callable[[], float]) -> _Cost:
    probe = next(probe for probe in spec.probes if probe.probe_id == trial.probe_id)
    n_long = min(N_LONG, spec.decoding.max_tokens)
    n_short = min(N_SHORT, n_long)

    def elapsed_s(n_tokens: int) -> float:
        started = clock()
        sampler.sample(trial, probe, replace(spec.decoding, max_tokens=n_tokens))
        return clock() - started

    first, short, long = elapsed_s(n_short), elapsed_s(n_short), elapsed_s(n_long)
    step = max(0.0, long - short) / (n_long - n_short) if n_long > n_short else 0.0
    return _Cost(trial.load.batch_size, max(0.0, first - short), short - n_short * step, step)


def _between(costs: Sequence[_Cost], n_rows: int) -> _Cost:
    small, large = costs[0], costs[-1]
    if small is large:
        return replace(small, n_rows=n_rows)
    share = (n_rows - small.n_rows) / (large.n_rows - small.n_rows)

    def line(a: float, b: float) -> float:
        return a + share * (b - a)

    return _Cost(
        n_rows,
        line(small.first_s, large.first_s),
        line(small.start_s, large.start_s),
        line(small.step_s, large.step_s),
    )
