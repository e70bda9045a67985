"""`ndcheck run --engine vllm` from the command line, with the stand-in of tests/samplers/vllm."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

FAKE = Path(__file__).parents[2] / "samplers" / "vllm" / "fake"
PROMPT = "the quick answer depends on order because sums are not associative"
OPTIONS = ("--engine", "vllm", "--prompt", PROMPT, "--loads", "1,4", "-n", "40")


@pytest.fixture
def with_fake(monkeypatch, environment):
    def plant(fault):
        places = filter(None, (str(FAKE), environment.get("PYTHONPATH")))
        environment.update({"PYTHONPATH": os.pathsep.join(places), "FAKE_VLLM": fault})

    return plant


def samples(run):
    lines = (run / "samples.jsonl").read_text().splitlines()
    return [{**json.loads(line), "elapsed_s": None, "nonce": None} for line in lines]


def workers_of_a_run_in(folder):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_worker = "ndcheck.samplers.vllm.worker" in (process / "cmdline").read_text()
            if is_worker and (process / "cwd").readlink() == folder:
                found.append(int(process.name))
    return found


def test_without_vllm_one_line_names_the_extra(ndcheck, tmp_path):
    done = ndcheck("run", "--quiet", "--engine", "vllm")
    assert done.returncode == 2
    assert done.stderr == "ndcheck: --engine vllm needs vLLM: pip install 'ndcheck[vllm]'\n"
    assert list(tmp_path.iterdir()) == []
    assert ndcheck("run", *OPTIONS, "--dry-run").returncode == 0


def test_the_default_prompt_is_measured_and_the_gap_is_named(ndcheck, with_fake, tmp_path):
    with_fake("clean")
    options = ("--engine", "vllm", "--loads", "1,2", "-n", "12", "--max-tokens", "4")
    done = ndcheck("run", *options, "--out", "run")
    assert done.returncode == 3, done.stderr  # a clean stock arm is no control
    assert "the prefix cache, which holds blocks of 4 tokens" in done.stderr
    states = {s["cache_state"] for s in samples(tmp_path / "run")}
    assert states == {"whole", "chunked"}
    assert all(s["error"] is None for s in samples(tmp_path / "run"))


def test_stock_is_the_control_of_invariant(ndcheck, with_fake, tmp_path):
    with_fake("batch-dependent")
    done = ndcheck("run", *OPTIONS, "--max-tokens", "8", "--tp", "2", "--out", "run", "--json")
    assert done.returncode == 1, done.stderr
    assert "the arms run interleaved, each in an engine of its own" in done.stderr
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert document["spec"]["engine"]["tensor_parallel"] == 2
    report = (tmp_path / "run" / "report.md").read_text()
    assert "--engine vllm --tp 2" in report
    by_arm = {arm: {tuple(s["token_ids"]) for s in samples(tmp_path / "run")
                    if s["arm"] == arm and s["axis"] != "control"}
              for arm in ("stock", "invariant")}  # fmt: skip
    assert {arm: len(found) for arm, found in by_arm.items()} == {"stock": 2, "invariant": 1}
    traced = ndcheck("trace", "--run", "run")
    assert traced.returncode == 2
    assert traced.stderr.endswith("ndcheck: builtin runs in vllm: no op can be seen there\n")


def test_a_killed_worker_loses_nothing_and_resume_completes(
    ndcheck, started, wait_for_lines, with_fake, warm_python, tmp_path
):
    with_fake("slow")
    options = (*OPTIONS, "--max-tokens", "8")
    assert ndcheck("run", *options, "--out", "whole").returncode == 3
    process = started("run", *options, "--out", "parts", python=warm_python())
    wait_for_lines(process, tmp_path / "parts" / "samples.jsonl", 10)
    os.kill(workers_of_a_run_in(tmp_path)[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 4
    *_, kept, last = stderr.splitlines()
    assert kept.endswith("go on with: ndcheck run --resume parts")
    assert "was killed by SIGKILL; last log lines: a line that the engine prints" in last
    Path(last.rpartition("whole log: ")[2]).unlink()
    before = samples(tmp_path / "parts")
    assert ndcheck("run", "--resume", "parts").returncode == 3
    after = samples(tmp_path / "parts")
    assert 10 <= len(before) < len(after)
    assert after[: len(before)] == before
    assert after == samples(tmp_path / "whole")


def test_ctrl_c_ends_the_workers(started, wait_for_lines, with_fake, warm_python, tmp_path):
    with_fake("slow")
    process = started("run", *OPTIONS, "--max-tokens", "8", "--out", "run", python=warm_python())
    wait_for_lines(process, tmp_path / "run" / "samples.jsonl", 2)
    workers = workers_of_a_run_in(tmp_path)
    assert len(workers) == 2
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--pp", "2"), ("--pp: this is for vLLM", "--engine vllm")),
        (("--engine", "vlm"), ("--engine", "'vlm'", "did you mean vllm")),
        (("--engine", "vllm", "--tp", "0"), ("--tp 0",)),
        (("--engine", "vllm", "--engine-arg", "x"), ("--engine-arg x", "KEY=VALUE")),
        (("--engine", "vllm", "--engine-arg", "model=x"), ("model: give --model",)),
        (("--engine", "vllm", "--engine-arg", "a=1", "--engine-arg", "a=2"), ("twice",)),
        (("--engine", "vllm", "--device", "cuda:1"), ("CUDA_VISIBLE_DEVICES",)),
        (("--engine", "vllm", "--attn", "eager"), ("attention_backend=NAME",)),
        (("--engine", "vllm", "--model", "scripted:clean"), ("--engine: ", "not scripted:NAME")),
        (("--engine", "vllm", "--loads", "auto"), ("--loads auto", "give numbers")),
        (
            ("--engine", "vllm", "--batching", "continuous"),
            ("--batching: with --engine vllm", "--endpoint"),
        ),
        (
            ("--engine", "vllm", "--endpoint", "http://127.0.0.1:1/v1", "--model", "m"),
            ("--engine: with --endpoint", "one of the two"),
        ),
    ],
)
def test_options_that_do_not_fit(ndcheck_here, options, parts):
    done = ndcheck_here("run", "--quiet", *options)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    for part in parts:
        assert part in line
