"""Planted faults through the whole pipeline: each must be caught, the clean stream must pass."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from ndcheck import __version__
from ndcheck.findings import Findings, read_findings
from ndcheck.judging.verdict import Outcome
from ndcheck.plan.trials import plan_trials
from ndcheck.records import Axis, Environment, Run
from ndcheck.request import DEFAULTS
from ndcheck.runner import run_trials
from ndcheck.samplers.base import Sampler
from ndcheck.samplers.scripted.sampler import FORK_AT, LATENT_AT, ScriptedSampler
from ndcheck.storage.run_directory import RunDirectory


@dataclass(frozen=True, slots=True)
class Case:
    """A scripted behaviour and what a sound measurement says of it."""

    behaviour: str
    claim: str
    outcome: Outcome
    failing_axes: frozenset[Axis]
    first_divergence: int | None = None
    latent_at: int | None = None


CASES = (
    Case("clean", "a clean stream passes", "PASS", frozenset()),
    Case(
        "fork",
        f"one odd execution of the probe alone, at token {FORK_AT + 1}, is laid to run-to-run",
        "FAIL",
        frozenset({"run-to-run"}),
        FORK_AT,
    ),
    Case(
        "flaky",
        "a fork in every fifth trial, whatever its load, is laid to run-to-run alone",
        "FAIL",
        frozenset({"run-to-run"}),
        FORK_AT,
    ),
    Case(
        "stale",
        "what a larger batch leaves behind is laid to run-to-run alone",
        "FAIL",
        frozenset({"run-to-run"}),
        FORK_AT,
    ),
    Case(
        "latent",
        f"one ULP in one logit at token {LATENT_AT + 1} is found, tokens equal",
        "FAIL",
        frozenset({"batch-size"}),
        latent_at=LATENT_AT,
    ),
    Case(
        "batch-dependent",
        "a change with the batch size is laid to batch-size alone",
        "FAIL",
        frozenset({"batch-size"}),
        FORK_AT,
    ),
    Case(
        "slot-dependent",
        "a change with the row is laid to slot alone",
        "FAIL",
        frozenset({"slot"}),
        FORK_AT,
    ),
    Case(
        "neighbour-dependent",
        "a change with the fillers is laid to neighbours alone",
        "FAIL",
        frozenset({"neighbours"}),
        FORK_AT,
    ),
    Case(
        "cache-dependent",
        "a change with chunked prefill is laid to cache alone",
        "FAIL",
        frozenset({"cache"}),
        FORK_AT,
    ),
    Case(
        "width-dependent",
        "a change with passes of several tokens is laid to width alone",
        "FAIL",
        frozenset({"width"}),
        FORK_AT,
    ),
    Case(
        "scoring-dependent",
        "a change where prompt and completion share a pass is laid to scoring alone",
        "FAIL",
        frozenset({"scoring"}),
        FORK_AT,
    ),
    Case("never-batches", "batches that never formed do not pass", "INCONCLUSIVE", frozenset()),
)


def run_cases(cases: tuple[Case, ...] = CASES) -> Iterator[tuple[Case, str | None]]:
    """Each case with None if it was judged rightly, or with what was seen instead."""
    for case in cases:
        yield case, find_mistake(case, measure(ScriptedSampler(case.behaviour)))


def measure(sampler: Sampler) -> Findings:
    """Plan, run, store, read back, summarise and judge, with a small grid.

    The samples are gone with their directory.
    """
    spec = replace(
        DEFAULTS,
        arms=("stock",),
        model="scripted",
        decoding=replace(DEFAULTS.decoding, max_tokens=8),
        batch_sizes=(1, 3),
        n_samples=40,
    )
    lengths = {probe.probe_id: sampler.count_tokens(probe.content) for probe in spec.probes}
    trials = plan_trials(spec, lengths, sampler.context)
    run = Run(
        "selftest", __version__, spec, Environment(), started_at="", n_trials_planned=len(trials)
    )
    with tempfile.TemporaryDirectory(prefix="ndcheck-selftest-") as name:
        path = Path(name) / "run"
        with closing(RunDirectory.create(path, run)) as directory:
            run_trials(trials, sampler, directory)
        return read_findings(path)


def find_mistake(case: Case, findings: Findings) -> str | None:
    """None if the verdict, the guilty properties and the positions are those planted."""
    judgement, summary = findings.judgement, findings.summary
    (probe,), (probe_verdict,) = summary.probes, judgement.probes
    failing = {axis for axis, verdict in probe_verdict.axes.items() if verdict.outcome == "FAIL"}
    if judgement.verdict.outcome != case.outcome:
        return f"judged {judgement.verdict.outcome} instead of {case.outcome}"
    if failing != case.failing_axes:
        return f"laid to {', '.join(sorted(failing)) or 'nothing'}"
    diverged = [c.first_divergence for c in probe.completions if c.first_divergence is not None]
    if min(diverged, default=None) != case.first_divergence:
        return f"first divergence at {diverged} instead of {case.first_divergence}"
    latent = summary.samples.latent_divergence
    if case.latent_at is not None and set(latent[latent >= 0].tolist()) != {case.latent_at}:
        return "the latent change was not found where it was planted"
    return None
