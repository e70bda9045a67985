"""One reading for every report, and one rule for which samples may be the reference."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ndcheck.errors import UsageError
from ndcheck.explain.failing import find_failure
from ndcheck.findings import find, read_findings
from ndcheck.plan.trials import plan_trials
from ndcheck.records import AXES, Decoding, Environment, Load, Run, Sample, Witness
from ndcheck.request import DEFAULTS
from ndcheck.runner import Progress, run_trials
from ndcheck.samplers.scripted.sampler import FORK_AT, ScriptedSampler
from ndcheck.storage.explanation import EXPLANATION_FILE, save_explanation
from ndcheck.storage.run_directory import RunDirectory, SampleReader
from ndcheck.storage.sample_lines import decode_line, encode_line

RECORDED = Path(__file__).parent / "runs" / "fork"
SPEC = replace(DEFAULTS, arms=("stock",), decoding=Decoding(8), batch_sizes=(1, 4), n_samples=60)
TRIALS = plan_trials(SPEC, {"p1": 4}, 1000)
SAMPLE = Sample(
    0, 0, "stock", "p1", "reference", None, Load(1), 0, Witness(1), (1,), ("a",), "stop", 1
)


@pytest.mark.parametrize(
    ("changes", "may_be"),
    [
        ({}, True),
        ({"purpose": "run-to-run", "baseline": 0}, True),
        ({"error": "out of memory", "token_ids": ()}, False),
        ({"purpose": "control", "baseline": 0}, False),
        ({"load": Load(2, (0, 1))}, False),
        ({"load": Load(1, cache_state="chunked"), "purpose": "cache"}, False),
        ({"load": Load(2, (0,), (3,)), "baseline": 0}, False),
    ],
)
def test_only_the_probe_alone_is_a_reference(changes, may_be):
    """The vocabulary's: the probe's completion alone, so no batch, no failure, no planted fault."""
    assert replace(SAMPLE, **changes).is_reference == may_be


class FailsFirst(ScriptedSampler):
    """Its first ``n`` trials fail."""

    def __init__(self, behaviour, n):
        super().__init__(behaviour)
        self.n = n

    def sample(self, trial, probe, decoding):
        samples = super().sample(trial, probe, decoding)
        if trial.trial_id >= self.n:
            return samples
        empty = {"token_ids": (), "token_texts": (), "logprobs": (), "margins": ()}
        return [replace(s, error="boom", row_digests=(), **empty) for s in samples]


def measure(path, sampler):
    seen: list[Progress] = []
    run = Run("r", "0", SPEC, Environment(), "", n_trials_planned=len(TRIALS))
    directory = RunDirectory.create(path, run)
    run_trials(TRIALS, sampler, directory, on_progress=seen.append)
    directory.close()
    return seen[-1]


def test_a_control_is_planted_within_the_first_reference_that_did_not_fail(tmp_path):
    measure(tmp_path, FailsFirst("clean", 1))
    controls = [s for s in SampleReader(tmp_path) if s.role == "control"]
    assert [(s.load.width, s.load.scores) for s in controls] == [(1, False), (2, False), (1, True)]
    assert {(s.fault.latent_at, s.fault.fork_at) for s in controls} == {(2, 4)}


def test_a_batch_never_stands_in_for_a_reference_that_failed(tmp_path):
    """Batches part from the probe alone at FORK_AT, and agree among each other."""
    measure(tmp_path / "run", FailsFirst("batch-dependent", 3))
    findings = read_findings(tmp_path / "run")
    ((key, trial_id),) = findings.summary.references.items()
    reference = findings.measured.references[key]
    assert (reference.load, reference.trial_id) == (Load(1), trial_id)
    failure = find_failure(tmp_path / "run", None)
    assert failure.sample.load.batch_size > 1
    assert failure.position == FORK_AT


def test_a_directory_and_its_samples_in_memory_show_the_same():
    read = read_findings(RECORDED)
    found = find(read.run, list(read.samples))
    assert found.judgement == read.judgement
    assert found.summary.references == read.summary.references
    assert read.directory == RECORDED
    assert set(read.verdicts) == {(p.arm, p.probe_id) for p in read.summary.probes}
    assert (read.bad_lines, read.advice) == ((), ())


def test_a_line_that_contradicts_the_plan_is_named_and_keeps_the_run_from_passing(tmp_path):
    whole, cut = RECORDED.parent / "clean", tmp_path / "cut"
    assert read_findings(whole).judgement.verdict.outcome == "PASS"
    shutil.copytree(whole, cut)
    with (cut / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"sample_id": 1}) + "\n")
    damaged = read_findings(cut)
    assert damaged.judgement.verdict.outcome == "INCONCLUSIVE"
    (line,) = damaged.bad_lines
    assert "is ignored: " in line
    assert line in damaged.run.flaws[0]


def test_a_damaged_explanation_takes_no_verdict_away(tmp_path):
    there = tmp_path / "run"
    shutil.copytree(RECORDED, there)
    save_explanation(there, 3, {1: ["mm follows the batch"]})
    assert read_findings(there).advice == ("sample 3, token 2: mm follows the batch",)
    (there / EXPLANATION_FILE).write_text("{")
    damaged = read_findings(there)
    assert damaged.judgement == read_findings(RECORDED).judgement
    with pytest.raises(UsageError, match="delete it or trace again"):
        _ = damaged.advice


@pytest.mark.parametrize(
    ("purpose", "role"),
    [("reference", "reference"), ("control", "control"), *((axis, "trial") for axis in AXES)],
)
def test_a_role_is_no_axis_and_files_keep_both_as_one(purpose, role):
    sample = replace(SAMPLE, purpose=purpose)
    assert sample.role == role
    line = encode_line(sample)
    document = json.loads(line)
    assert document["axis"] == purpose
    assert not {"purpose", "role"} & set(document)
    assert decode_line(line) == sample


def test_nothing_is_invented_of_tokens_fed_again():
    """300 clean runs, each with other loads, widths and fillers; the planted faults are caught."""
    for seed in range(300):
        draw = random.Random(seed)
        spec = replace(
            SPEC,
            axes=("width", "scoring"),
            batch_sizes=(1, draw.randint(2, 6)),
            widths=tuple(sorted(draw.sample(range(2, 8), 2))),
            n_samples=draw.randint(30, 50),
            seed=seed,
        )
        trials = plan_trials(spec, {"p1": draw.randint(2, 20)}, 1000)
        run = Run("r", "0", spec, Environment(), "", n_trials_planned=len(trials))
        sampler = ScriptedSampler("clean")
        samples = [s for t in trials for s in sampler.sample(t, spec.probes[0], spec.decoding)]
        (probe,) = find(run, samples).summary.probes
        found = {a.axis: a.diverged_trials + a.latent_trials for a in probe.axes if a.n_trials}
        assert found.keys() >= {"width", "scoring"}
        assert not any(found.values()), (seed, found)
