"""Bad input: one clear line on stderr, exit code 2 or 4, no traceback."""

from __future__ import annotations

import json
import resource
import sys

import pytest

SCRIPTED = ("--model", "scripted:clean", "--max-tokens", "8")


def assert_one_line(done, code, *parts):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("ndcheck: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--loads", "0"), ("--loads", "'0'")),
        (("--loads", "-1"), ("--loads", "'-1'")),
        (("--loads", "two"), ("--loads", "'two'")),
        (("--loads", "2,2"), ("--loads", "twice")),
        (("--axes", "speed"), ("--axes", "'speed'", "run-to-run")),
        (("--axes", "all,slot"), ("--axes all,slot: all stands alone",)),
        (("--mode", "both"), ("--mode", "copies, mixed")),
        (("--kernels", "fast"), ("--kernels", "stock")),
        (("-n", "0"), ("--samples 0",)),
        (("-n", "many"), ("--samples many", "a whole number")),
        (("--max-tokens", "200000"), ("context of 100000",)),
        (("--max-tokens", "0"), ("--max-tokens 0",)),
        (("--temperature", "-1"), ("--temperature",)),
        (("--prompt", ""), ("prompt p1 is empty",)),
        (("--prompts-file", "missing.txt"), ("missing.txt",)),
        (("--answer-pattern", "("), ("--answer-pattern",)),
        (("--target-rate", "2"), ("--target-rate",)),
        (("--model", "scripted:none"), ("scripted", "batch-dependent")),
        (("--bogus",), ("--bogus",)),
        (("--resume", "missing"), ("--model",)),
    ],
)
def test_options(ndcheck_here, tmp_path, options, parts):
    assert_one_line(ndcheck_here("run", "--quiet", *SCRIPTED, *options), 2, *parts)
    assert list(tmp_path.iterdir()) == []


def test_unknown_command_and_missing_argument(ndcheck_here):
    assert_one_line(ndcheck_here("meassure"), 2, "meassure")
    assert_one_line(ndcheck_here("report"), 2, "DIR")


@pytest.mark.parametrize("model", ["missing/model", "./empty"])
def test_models_that_are_not_there(ndcheck_here, tmp_path, model):
    (tmp_path / "empty").mkdir()
    done = ndcheck_here("run", "--quiet", "--model", model)
    assert_one_line(done, 2, "--model", model, "accepted: builtin")


def test_attention_that_there_is_not(ndcheck_here):
    done = ndcheck_here("run", "--quiet", "--attn", "nope")
    assert_one_line(done, 2, "ndcheck: --attn: ", '"nope"', "sdpa")
    assert "config.json" not in done.stderr


def test_attention_that_cannot_be_used(ndcheck_here):
    """A package that is not installed, and one for a cache that no exact batch has."""
    done = ndcheck_here("run", "--quiet", "--attn", "flash_attention_2")
    assert_one_line(done, 2, "ndcheck: --attn: FlashAttention2")
    done = ndcheck_here("run", "--quiet", "--attn", "paged|sdpa")
    assert_one_line(done, 2, "ndcheck: --attn paged|sdpa: give sdpa")


def test_model_without_tokenizer(ndcheck, tmp_path, tiny_models):
    for file in tiny_models["llama"].iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    assert_one_line(ndcheck("run", "--quiet", "--model", "."), 2, "tokenizer")


def test_prompt_longer_than_the_context(ndcheck, tiny_models):
    options = ("--model", tiny_models["llama"], "--prompt", "a b c " * 100, "--max-tokens", "8")
    assert_one_line(ndcheck("run", "--quiet", *options), 2, "exceeds the model's context of 256")


def test_directory_in_use(ndcheck, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert_one_line(ndcheck("run", "--quiet", *SCRIPTED, "--out", "full"), 2, "is not empty")
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_unwritable_directory(ndcheck):
    done = ndcheck("run", "--quiet", *SCRIPTED, "--out", "/proc/ndcheck/run")
    assert_one_line(done, 4, "cannot write to /proc/ndcheck/run")


def test_full_disk_keeps_finished_trials(ndcheck, tmp_path):
    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    options = ("--quiet", *SCRIPTED, "--out", "run")
    done = ndcheck("run", *options, python=sys.executable, preexec_fn=limit_file_size)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "cannot write to run: File too large" in done.stderr
    resumed = ndcheck("run", "--quiet", "--resume", "run")
    assert resumed.returncode == 0, resumed.stderr


def test_damaged_samples_are_named_and_the_rest_reported(ndcheck, tmp_path):
    ndcheck("run", "--quiet", *SCRIPTED, "--out", "run")
    file = tmp_path / "run" / "samples.jsonl"
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:5], b"oops\n", *lines[6:-1], lines[-1][:50]]))
    done = ndcheck("report", "run", "--exit-code")
    assert done.returncode == 3
    assert "line 6 is ignored" in done.stderr
    assert f"line {len(lines)} is ignored" in done.stderr


def test_newer_schema(ndcheck, tmp_path):
    ndcheck("run", "--quiet", *SCRIPTED, "--out", "run")
    file = tmp_path / "run" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": 2}))
    assert_one_line(ndcheck("report", "run"), 2, "schema version 2", "upgrade ndcheck")


def test_report_of_nothing(ndcheck, tmp_path):
    assert_one_line(ndcheck("report", "nowhere"), 2, "nowhere holds no run")


@pytest.mark.parametrize(
    "command",
    [
        ("order", "sum", "--svg"),
        ("order", "sum", "--dot"),
        ("kernels", "manifest"),
        ("gate", "--junit"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    ndcheck_here, tmp_path, command
):
    """Nothing on stderr but the line: no progress of what would then be lost."""
    (tmp_path / "ndcheck.toml").write_text(
        '[checks.a]\nmodel = "scripted:clean"\nmax_tokens = 8\nloads = [1, 2]\nsamples = 20\n'
    )
    (tmp_path / "file").touch()
    for out in ("/dev/full", "file/x.out"):
        assert_one_line(ndcheck_here(*command, out), 4, f"cannot write to {out}")
    assert not (tmp_path / "ndcheck-runs").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("order", "sum", "--svg"),
        ("order", "sum", "--dot"),
        ("kernels", "check", "--csv"),
        ("kernels", "prove", "--export"),
        ("gate", "--junit"),
        ("score", "run", "--csv"),
        ("score", "run", "--plot"),
        ("shrink", "--run", "run", "--out"),
    ],
)
def test_a_directory_is_no_output(ndcheck_here, tmp_path, command):
    (tmp_path / "folder").mkdir()
    assert_one_line(ndcheck_here(*command, "folder"), 2, command[-1], "'folder' is a directory")


def test_two_outputs_in_one_file_are_refused(ndcheck_here):
    done = ndcheck_here("order", "sum", "--svg", "x.out", "--dot", "./x.out")
    assert_one_line(done, 2, "x.out: two outputs would be written to it")


@pytest.mark.parametrize("name", ["run.json", "samples.jsonl"])
def test_an_output_never_takes_the_place_of_evidence(ndcheck_here, tmp_path, name):
    assert ndcheck_here("run", *SCRIPTED, "--out", "run", "-q").returncode == 0
    held = (tmp_path / "run" / name).read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "run" / name)
    for path in (f"run/{name}", "link"):
        done = ndcheck_here("gate", "run", "--junit", path)
        assert_one_line(done, 2, f"{path}: it holds what was measured")
    assert (tmp_path / "run" / name).read_bytes() == held


def test_a_file_of_prompts_that_is_a_stream_is_told_of_standard_input(ndcheck_here):
    done = ndcheck_here("run", *SCRIPTED, "--prompts-file", "/dev/null")
    assert_one_line(done, 2, "it is a device, not a file: give it on standard input, as -")


def test_a_target_that_takes_very_many_trials_is_a_short_line(ndcheck_here):
    for rate in ("1e-300", "5e-324"):
        done = ndcheck_here("run", *SCRIPTED, "--target-rate", rate)
        assert_one_line(done, 2, "which takes 10^12 or more trials")
        assert len(done.stderr) < 200
