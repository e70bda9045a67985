"""Runs of a sampler whose passes of several tokens can be spoilt."""

from __future__ import annotations

import inspect
from contextlib import closing

import pytest

from ndcheck.findings import read_findings
from ndcheck.records import Environment, Run
from ndcheck.runner import plan, run_trials
from ndcheck.storage.run_directory import RunDirectory


@pytest.fixture(scope="module")
def measure(request):
    """Run a spec, or the module's own, into a directory; what it finds, of its one probe too."""

    def run(sampler, path, spec=request.module.SPEC):
        trials = plan(spec, sampler)
        about = Run("r", "0", spec, Environment(), "", n_trials_planned=len(trials))
        with closing(RunDirectory.create(path, about)) as directory:
            run_trials(trials, sampler, directory)
        findings = read_findings(path)
        (probe,), (verdict,) = findings.summary.probes, findings.judgement.probes
        return findings, probe, verdict

    return run


@pytest.fixture
def wide(monkeypatch):
    """Let a change move the logits [B, positions, V] of every pass, by its columns."""

    def spoil(sampler, change):
        forward = sampler.model.forward

        def moved(*arguments, **options):
            output = forward(*arguments, **options)
            output.logits = change(output.logits, options["input_ids"].shape[1])
            return output

        moved.__signature__ = inspect.signature(forward)
        monkeypatch.setattr(sampler.model, "forward", moved)

    return spoil
