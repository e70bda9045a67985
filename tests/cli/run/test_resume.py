"""kill -9, Ctrl-C, resume: nothing finished is lost, and the result is the same."""

from __future__ import annotations

import json
import signal

import pytest

from ndcheck.errors import BackendError, TrialError, UsageError
from ndcheck.samplers.scripted.sampler import ScriptedSampler

OPTIONS = ("--model", "scripted:slow", "--max-tokens", "8", "--loads", "1,4", "-n", "40")


def samples_without_times(run):
    lines = (run / "samples.jsonl").read_text().splitlines()
    return [{**json.loads(line), "elapsed_s": None, "nonce": None} for line in lines]


def test_killed_and_resumed_equals_uninterrupted(ndcheck_here, started, wait_for_lines, tmp_path):
    assert ndcheck_here("run", *OPTIONS, "--out", "whole/run").returncode == 0
    process = started("run", *OPTIONS, "--out", "parts/run")
    wait_for_lines(process, tmp_path / "parts" / "run" / "samples.jsonl", 10)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_before = len(samples_without_times(tmp_path / "parts" / "run"))
    resumed = ndcheck_here("run", "--resume", "parts/run")
    assert resumed.returncode == 0, resumed.stderr
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    assert 10 <= n_before < len(samples_without_times(parts))
    assert samples_without_times(parts) == samples_without_times(whole)
    assert (parts / "completions.csv").read_bytes() == (whole / "completions.csv").read_bytes()


def test_interrupt_reports_what_there_is(
    ndcheck_here, started, wait_for_lines, warm_python, tmp_path
):
    for number in (signal.SIGINT, signal.SIGTERM):
        out = f"run-{number}"
        process = started("run", *OPTIONS, "--out", out, python=warm_python())
        wait_for_lines(process, tmp_path / out / "samples.jsonl", 5)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 130
        assert stdout.startswith("INCONCLUSIVE")
        assert f"ndcheck run --resume {out}" in stderr
        assert "Traceback" not in stderr
        assert (tmp_path / out / "report.md").exists()
        assert json.loads((tmp_path / out / "run.json").read_text())["status"] == "interrupted"
        assert ndcheck_here("run", "--resume", out).returncode == 0


def test_second_process_is_refused(ndcheck_here, started, wait_for_lines, tmp_path):
    process = started("run", *OPTIONS, "--out", "run")
    wait_for_lines(process, tmp_path / "run" / "samples.jsonl", 1)
    done = ndcheck_here("run", "--resume", "run", "--quiet")
    assert done.returncode == 2
    assert "another ndcheck is writing run" in done.stderr


def test_a_finished_run_resumes_to_itself(ndcheck_here, tmp_path):
    ndcheck_here("run", "--model", "scripted:clean", "--max-tokens", "8", "--out", "run")
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()
    assert ndcheck_here("run", "--resume", "run").returncode == 0
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before


def test_resume_in_another_environment_is_refused(ndcheck_here, tmp_path):
    ndcheck_here("run", "--model", "scripted:clean", "--max-tokens", "8", "--out", "run")
    file = tmp_path / "run" / "run.json"
    document = json.loads(file.read_text())
    document["environment"]["software"]["torch"] = "1.0"
    file.write_text(json.dumps(document))
    done = ndcheck_here("run", "--resume", "run", "--quiet")
    assert done.returncode == 2
    assert "software.torch: 1.0, now" in done.stderr


@pytest.mark.parametrize(
    ("outcomes", "is_advised"),
    [
        ([None, None, BackendError("gone")], True),
        ([TrialError("busy"), None, BackendError("gone")], True),
        ([TrialError("busy"), TrialError("busy"), BackendError("gone")], False),
        ([BackendError("gone")], False),
        ([None, None, UsageError("refused")], False),
    ],
)
def test_a_resume_is_advised_where_it_may_end_otherwise(
    ndcheck_here, monkeypatch, outcomes, is_advised
):
    """By the line that ends the run and by its report alike."""
    sample, left = ScriptedSampler.sample, iter(outcomes)

    def sample_or_fail(*arguments):
        if (error := next(left)) is not None:
            raise error
        return sample(*arguments)

    monkeypatch.setattr(ScriptedSampler, "sample", sample_or_fail)
    model = ("--model", "scripted:clean", "--loads", "1,2", "-n", "8", "--max-tokens", "4")
    done = ndcheck_here("run", *model, "--out", "run")
    assert done.returncode == outcomes[-1].exit_code
    command = "ndcheck run --resume run"
    assert (command in done.stderr, command in done.stdout) == (is_advised, is_advised)
