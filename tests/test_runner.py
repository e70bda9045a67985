"""Trials run in order, each kept before the next; failures and interruptions lose nothing."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest

from ndcheck.analysis.divergence import first_divergence
from ndcheck.errors import BackendError, UsageError
from ndcheck.findings import read_findings
from ndcheck.plan.trials import plan_trials
from ndcheck.records import Decoding, Environment, Run
from ndcheck.request import DEFAULTS
from ndcheck.runner import refuse_other_prompts, run_trials
from ndcheck.samplers.scripted.sampler import ScriptedSampler
from ndcheck.storage.run_directory import RunDirectory, SampleReader, read_run

SPEC = replace(DEFAULTS, arms=("stock",), decoding=Decoding(8), batch_sizes=(1, 4), n_samples=60)
TRIALS = plan_trials(SPEC, {"p1": 4}, 1000)


def run(path, behaviour, spec=SPEC, **options):
    with closing(RunDirectory.create(path, Run("r", "0", spec, Environment(), ""))) as directory:
        return run_trials(TRIALS, ScriptedSampler(behaviour), directory, **options)


class Interrupting(ScriptedSampler):
    def __init__(self, behaviour, after):
        super().__init__(behaviour)
        self.after = after

    def sample(self, trial, probe, decoding):
        if trial.trial_id == self.after:
            raise KeyboardInterrupt
        return super().sample(trial, probe, decoding)


def without_times(path):
    return [replace(sample, elapsed_s=0.0) for sample in SampleReader(path)]


def test_every_planned_sample_is_stored_in_order(tmp_path):
    finished = run(tmp_path, "clean")
    assert finished.status == "finished"
    assert read_run(tmp_path) == finished
    samples = list(SampleReader(tmp_path))
    assert [s.sample_id for s in samples] == list(range(len(samples)))
    counted = [s for s in samples if s.role != "control" and not s.load.is_fed]
    assert len(counted) == SPEC.n_samples


def test_what_diverged_once_runs_once_more(tmp_path):
    run(tmp_path, "cache-dependent")
    samples = list(SampleReader(tmp_path))
    planned = {t.trial_id: t for t in TRIALS}
    added = [s for s in samples if s.trial_id not in planned]
    loads = [planned[s.baseline].load for s in added]
    assert loads == [s.load for s in added]
    assert {s.purpose for s in added} == {"run-to-run"}
    assert {load.cache_state for load in loads} == {"chunked", "prefix"}
    assert read_run(tmp_path).n_trials_planned == len({s.trial_id for s in samples})
    assert [s.sample_id for s in samples] == list(range(len(samples)))


@pytest.mark.parametrize("n_left_out", [1, 2])
def test_a_confirmation_is_resumed_like_any_trial(tmp_path, n_left_out):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, "cache-dependent")
    added = {s.trial_id for s in SampleReader(whole) if s.trial_id >= len(TRIALS)}
    sampler = Interrupting("cache-dependent", sorted(added)[-n_left_out])
    directory = RunDirectory.create(cut, Run("r", "0", SPEC, Environment(), ""))
    with closing(directory), pytest.raises(KeyboardInterrupt):
        run_trials(TRIALS, sampler, directory)
    directory, finished = RunDirectory.resume(cut)
    with closing(directory):
        run_trials(TRIALS, ScriptedSampler("cache-dependent"), directory, finished)
    assert without_times(cut) == without_times(whole)


def test_control_is_planted_within_the_reference(tmp_path):
    run(tmp_path, "clean")
    controls = [s for s in SampleReader(tmp_path) if s.role == "control"]
    assert [(s.load.width, s.load.scores) for s in controls] == [(1, False), (2, False), (1, True)]
    assert {(s.fault.latent_at, s.fault.fork_at) for s in controls} == {(2, 4)}


def test_control_is_planted_before_its_baseline_diverges(tmp_path):
    run(tmp_path, "scoring-dependent")
    samples = list(SampleReader(tmp_path))
    kept = {s.trial_id: len(s.token_ids) for s in samples}
    controls = [s for s in samples if s.role == "control"]
    assert [kept[s.baseline] for s in controls] == [8, 8, 4]
    assert all(s.fault.fork_at < kept[s.baseline] for s in controls)
    (probe,) = read_findings(tmp_path).summary.probes
    assert (probe.control.n_caught, probe.control.n_trials) == (3, 3)


def test_failing_loads_are_recorded_not_dropped(tmp_path):
    assert run(tmp_path, "out-of-memory").status == "finished"
    samples = list(SampleReader(tmp_path))
    assert len(samples) == sum(t.n_samples for t in TRIALS)
    for sample in samples:
        assert (sample.error is not None) == (sample.load.batch_size >= 4)


def test_a_dead_backend_ends_the_run_and_keeps_what_is_finished(tmp_path):
    with pytest.raises(BackendError):
        run(tmp_path, "dies")
    assert read_run(tmp_path).status == "failed"
    assert len({s.trial_id for s in SampleReader(tmp_path)}) == 5


@pytest.mark.parametrize("after", [0, 1, 2, 7, len(TRIALS) - 1])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, after):
    run(tmp_path / "whole", "batch-dependent")
    path = tmp_path / "parts"
    with closing(RunDirectory.create(path, Run("r", "0", SPEC, Environment(), ""))) as directory:
        with pytest.raises(KeyboardInterrupt):
            run_trials(TRIALS, Interrupting("batch-dependent", after), directory)
        assert directory.run.status == "interrupted"
    directory, finished = RunDirectory.resume(path)
    with closing(directory):
        run_trials(TRIALS, ScriptedSampler("batch-dependent"), directory, finished)
    assert without_times(path) == without_times(tmp_path / "whole")


def test_stop_on_divergence(tmp_path):
    finished = run(tmp_path, "batch-dependent", replace(SPEC, stop_on_divergence=True))
    samples = list(SampleReader(tmp_path))
    assert "first divergence" in finished.stop_reason
    assert samples[-1].load.batch_size == 4
    assert all(s.load.batch_size == 1 for s in samples[:-4])


def test_progress_counts(tmp_path):
    seen = []
    run(
        tmp_path,
        "batch-dependent",
        on_progress=lambda p: seen.append((p.n_done, dict(p.unique), p.first_divergence)),
    )
    assert [n for n, _, _ in seen] == list(range(1, len(TRIALS) + 1))
    assert seen[0][1:] == ({"stock": 1}, None)
    assert seen[-1][1:] == ({"stock": 2}, 3)


def test_first_divergence():
    assert first_divergence((1, 2), (1, 2)) is None
    assert first_divergence((1, 2), (1, 3)) == 1
    assert first_divergence((1,), (1, 3)) == 1
    assert first_divergence((), ()) is None


def test_a_run_goes_on_with_the_prompts_that_it_began_with(tmp_path):
    class Telling(ScriptedSampler):
        ids = (1, 2)

        def encode(self, prompt):
            return self.ids

    begun = Run("r", "0", SPEC, Environment(), "", prompt_token_ids=("1 2",))
    sampler = Telling("clean")
    refuse_other_prompts(begun, sampler)
    refuse_other_prompts(replace(begun, prompt_token_ids=()), sampler)
    sampler.ids = (1, 3)
    with pytest.raises(UsageError, match="p1 has other tokens than when run r began"):
        refuse_other_prompts(begun, sampler)
