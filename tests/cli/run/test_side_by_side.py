"""Two arms at the same time: the same evidence as one after the other, and deaths by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ndcheck
from ndcheck.errors import BackendError
from ndcheck.plan.trials import plan_trials
from ndcheck.request import make_spec
from ndcheck.runner import plan
from ndcheck.samplers.base import open_for_run
from ndcheck.samplers.calibration import estimate
from ndcheck.samplers.local import backend
from ndcheck.samplers.local.backend import LocalBackend
from ndcheck.samplers.local.beside import sampler as beside_sampler
from ndcheck.samplers.local.beside.sampler import SideBySideSampler
from ndcheck.samplers.local.device import choose_threads
from ndcheck.samplers.local.sampler import TransformersSampler

OPTIONS = {
    "loads": [1, 2],
    "samples": 14,
    "max_tokens": 6,
    "axes": ["batch-size", "neighbours", "width"],
    "widths": [2],
    "device": "cpu",
}


@pytest.fixture
def beside(monkeypatch, warm_python):
    """Short runs go side by side too, whatever the machine; second arms need import nothing."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "executable", warm_python())
    monkeypatch.setattr(backend, "LEAST_TOKENS_BESIDE", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


@pytest.fixture
def workers(processes_of):
    """The processes of second arms that were started."""
    return processes_of("ndcheck.samplers.local.beside.worker")


def evidence(path: Path):
    """Everything that a run kept but its times and its name."""
    lines = (path / "samples.jsonl").read_text().splitlines()
    run = json.loads((path / "run.json").read_text())
    for name in ("run_id", "started_at", "elapsed_s", "nonce"):
        del run[name]
    return [{**json.loads(line), "elapsed_s": None, "nonce": None} for line in lines], run


@pytest.fixture(scope="module")
def one_after_the_other(tmp_path_factory):
    """The same run in one process: it is too short for two."""
    path = tmp_path_factory.mktemp("runs") / "run"
    return ndcheck.measure(out=path, **OPTIONS)


def test_the_evidence_is_that_of_one_arm_after_the_other(
    one_after_the_other, beside, workers, monkeypatch, tmp_path
):
    computed_here = []
    sample = TransformersSampler.sample

    def watched(self, trial, *rest):
        computed_here.append(trial.arm)
        return sample(self, trial, *rest)

    monkeypatch.setattr(TransformersSampler, "sample", watched)
    run = ndcheck.measure(out=tmp_path / "run", **OPTIONS)
    assert evidence(run.path) == evidence(one_after_the_other.path)
    assert run.judgement == one_after_the_other.judgement
    # The control: the other arm's trials ran elsewhere, and there were some of every role.
    assert set(computed_here) == {"stock"}
    assert len(workers) == 1
    assert workers[0].poll() == -signal.SIGKILL
    kept = [s for s in evidence(run.path)[0] if s["arm"] == "invariant"]
    assert {s["axis"] for s in kept} >= {"reference", "control", "batch-size", "width"}


def test_a_killed_process_is_named_and_one_process_completes_the_run(
    one_after_the_other, beside, workers, monkeypatch, ndcheck_here, tmp_path
):
    def kill(progress):
        if progress.n_done == 5:
            workers[0].kill()

    with pytest.raises(BackendError, match="process of the invariant arm was killed by SIGKILL"):
        ndcheck.measure(out=tmp_path / "run", on_progress=kill, **OPTIONS)
    before, record = evidence(tmp_path / "run")
    assert record["status"] == "failed"
    assert 5 <= len(before) < len(evidence(one_after_the_other.path)[0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    ndcheck_here("run", "--resume", "run")
    assert len(workers) == 1
    assert evidence(tmp_path / "run") == evidence(one_after_the_other.path)


def test_ctrl_c_ends_the_process_and_two_complete_the_run(
    one_after_the_other, beside, workers, ndcheck_here, tmp_path
):
    def interrupt(progress):
        if progress.n_done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ndcheck.measure(out=tmp_path / "run", on_progress=interrupt, **OPTIONS)
    assert workers[0].poll() == -signal.SIGKILL
    assert evidence(tmp_path / "run")[1]["status"] == "interrupted"
    done = ndcheck_here("run", "--resume", "run")
    assert "the arms run side by side, each in a process of its own" in done.stderr
    assert evidence(tmp_path / "run") == evidence(one_after_the_other.path)


@pytest.fixture
def two_threads(monkeypatch):
    """As many as the cores that `beside` sees, and nobody said how many."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_each_arm_has_its_share_of_the_cores_and_keeps_it_in_one_process(
    one_after_the_other, beside, two_threads, workers, monkeypatch, ndcheck_here, tmp_path
):
    sent, n_threads = [], set()
    send = beside_sampler._Worker.send
    monkeypatch.setattr(
        beside_sampler._Worker, "send", lambda *args: (sent.append(args[1]), send(*args))
    )

    def interrupt(progress):
        n_threads.add(torch.get_num_threads())
        if progress.n_done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ndcheck.measure(out=tmp_path / "run", on_progress=interrupt, **OPTIONS)
    assert n_threads == {1}
    assert sent[0][1] == 1
    assert torch.get_num_threads() == 2
    begun = evidence(tmp_path / "run")[1]
    assert begun["environment"]["numeric_flags"]["threads"] == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    ndcheck_here("run", "--resume", "run")
    assert len(workers) == 1
    assert torch.get_num_threads() == 2
    samples, run = evidence(tmp_path / "run")
    assert run["environment"] == begun["environment"]
    assert samples == evidence(one_after_the_other.path)[0]
    # The control: begun in one process, it would have had both cores.
    kept = ndcheck.measure(out=tmp_path / "other", **OPTIONS).record.environment
    assert kept.numeric_flags["threads"] == 2


@pytest.mark.parametrize(
    ("said", "begun_with", "n_processes", "chosen"),
    [
        ({}, None, 1, 2),
        ({}, None, 2, 1),
        ({"OMP_NUM_THREADS": "2"}, None, 2, 2),
        ({"MKL_NUM_THREADS": "2"}, None, 2, 2),
        # A run goes on as it began, if this process can.
        ({}, 1, 1, 1),
        ({}, 2, 2, 2),
        *(({}, other, 2, 1) for other in (3, 0, -1, "2", True, None)),
    ],
)
def test_threads_are_a_share_unless_somebody_said_how_many(
    said, begun_with, n_processes, chosen, beside, two_threads, monkeypatch
):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert choose_threads(begun_with, n_processes) == chosen


def test_the_process_ends_with_its_parent(beside, tmp_path):
    """Whatever it does then: here it opens its model."""
    script = (
        "import time\n"
        "from ndcheck.request import make_spec\n"
        "from ndcheck.samplers.local.beside.sampler import _Worker\n"
        "print(_Worker(make_spec())._process.pid, flush=True)\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.communicate()
    for _ in range(600):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("it outlived its parent by a minute")


def test_a_process_that_does_not_open_leaves_both_arms_here(beside, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    spec = make_spec(**OPTIONS)
    with closing(open_for_run(spec)) as sampler:
        assert isinstance(sampler, SideBySideSampler)
        said = "the arms run one after the other: the process of the invariant arm ended with 1"
        assert said in sampler.notes
        trials = plan(spec, sampler)[:4]
        assert {t.arm for t in trials} == {"stock", "invariant"}
        for trial in trials:
            sampler.begin(trial, spec.probes[0], spec.decoding)
            assert sampler.sample(trial, spec.probes[0], spec.decoding)


def test_what_a_trial_raises_there_is_raised_here(beside):
    spec = make_spec(**OPTIONS)
    with closing(open_for_run(spec)) as sampler:
        of_other = next(t for t in plan(spec, sampler) if t.arm == "invariant")
        with pytest.raises(AttributeError, match="max_tokens"):
            sampler.sample(of_other, spec.probes[0], None)
        # It goes on; and what has begun is not taken for another trial.
        assert sampler.sample(of_other, spec.probes[0], spec.decoding)
        sampler.begin(of_other, spec.probes[0], spec.decoding)
        with pytest.raises(RuntimeError, match="nobody took it"):
            sampler.begin(replace(of_other, trial_id=99), spec.probes[0], spec.decoding)


@pytest.mark.parametrize(
    "options",
    [
        {"kernels": ["stock"]},
        {"samples": 49},
        {"loads": "auto"},
        {"random_weights": 1},
        {"tp": 2},
    ],
)
def test_only_long_runs_of_small_models_go_side_by_side(options, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    long = {"samples": 50, "max_tokens": 100, "device": "cpu"}
    local = LocalBackend()
    assert local.runs_side_by_side(make_spec(**long))
    assert not local.runs_side_by_side(make_spec(**{**long, **options}))
    monkeypatch.setattr(backend, "MOST_BYTES_BESIDE", 1 << 20)
    assert not local.runs_side_by_side(make_spec(**long))
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(beside_sampler, "free_bytes", lambda device: 100 << 20)
    assert not local.runs_side_by_side(make_spec(**long))
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert not local.runs_side_by_side(make_spec(**long))


def test_a_plan_takes_as_long_as_its_longer_arm(beside):
    spec = make_spec(**OPTIONS)

    class Clock:
        now_s = 0.0

        def sample(self, trial, probe, decoding):
            self.now_s += decoding.max_tokens * (2 if trial.arm == "invariant" else 1)

    trials = plan_trials(spec, {"p1": 4}, 2048, None, ("whole",))
    clock = Clock()
    found = estimate(spec, trials, clock, lambda: clock.now_s)
    n_invariant = sum(t.arm == "invariant" for t in trials)
    assert found.elapsed_s == pytest.approx(n_invariant * spec.decoding.max_tokens * 2)
