"""What a plan has to hold so that every property asked for is tried."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ndcheck.plan.trials import plan_trials
from ndcheck.records import Axis, Purpose, RunSpec, Trial

OF_BATCHES: frozenset[Axis] = frozenset({"batch-size", "slot", "neighbours"})
"""Those that compare batches of two rows or more."""
TYPICAL_LENGTH = 32
"""Of a prompt, in tokens: how many trials a round has hardly depends on it."""
CELLS_OF_A_SIZE = 12
"""More than a round has of one batch size."""
N_TOLD = 500
"""A plan of so many draws takes some ten milliseconds."""


def lacks_batches(spec: RunSpec, axes: Collection[Axis]) -> bool:
    """Do any of these axes need a larger batch than any load has?"""
    return max(spec.batch_sizes, default=2) < 2 and not OF_BATCHES.isdisjoint(axes)


def untried_axes(spec: RunSpec, trials: Sequence[Trial]) -> list[Axis]:
    """The axes asked for along which some probe has no trial."""
    tried: dict[str, set[Purpose]] = {probe.probe_id: set() for probe in spec.probes}
    for trial in trials:
        tried[trial.probe_id].add(trial.purpose)
    return [axis for axis in spec.axes if any(axis not in found for found in tried.values())]


def samples_to_try_all(spec: RunSpec) -> int | None:
    """The samples that try every axis, of a prompt of usual length; None where none would."""
    # Of prompts of one length each has as many trials as any other.
    spec = replace(spec, probes=spec.probes[:1])
    most = CELLS_OF_A_SIZE * (1 + sum(spec.batch_sizes))
    if not spec.batch_sizes or untried_axes(
        spec, _plan(replace(spec, n_samples=most), TYPICAL_LENGTH)
    ):
        return None
    least = 1
    while least < most:
        middle = (least + most) // 2
        if untried_axes(spec, _plan(replace(spec, n_samples=middle), TYPICAL_LENGTH)):
            least = middle + 1
        else:
            most = middle
    return most


def has_loads(spec: RunSpec, n_draws: int, length: int) -> bool:
    """Are there so many draws of a prompt of ``length`` tokens? Of many, as far as is soon told."""
    n_draws = min(n_draws, N_TOLD)
    if spec.repeats_are_draws or spec.axes == ("run-to-run",):
        return True
    trials = _plan(replace(spec, probes=spec.probes[:1], arms=spec.arms[:1]), length, n_draws)
    return len({trial.load for trial in trials}) > n_draws


def _plan(spec: RunSpec, length: int, n_draws: int | None = None) -> list[Trial]:
    lengths = {probe.probe_id: length for probe in spec.probes}
    return plan_trials(spec, lengths, 4 * length + spec.decoding.max_tokens, n_draws)
