"""What a newcomer tries without the manual: each works, or says in one line what does."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest

from ndcheck.cli import completion
from ndcheck.cli.commands.order import OPS
from ndcheck.errors import UsageError
from ndcheck.explain.order.reductions import REDUCTIONS
from ndcheck.mock_server.faults import FAULTS
from ndcheck.records import AXES
from ndcheck.samplers.options import parse_batch_sizes, parse_widths

RUNS = Path(__file__).parents[1] / "runs"


@pytest.fixture
def two_runs(tmp_path):
    """`clean` began last, and has the name that comes first."""
    for name, started_at in (("b-fork", "2026-01-01T00:00:00"), ("a-clean", "2026-01-02T00:00:00")):
        run = tmp_path / "ndcheck-runs" / name
        shutil.copytree(RUNS / name[2:], run)
        record = run / "run.json"
        text = re.sub(r'"started_at": "[^"]*"', f'"started_at": "{started_at}"', record.read_text())
        record.write_text(text)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ((), "Usage: ndcheck [OPTIONS] COMMAND"),
        (("help",), "Usage: ndcheck [OPTIONS] COMMAND"),
        (("kernels",), "Usage: ndcheck kernels [OPTIONS] COMMAND"),
        (("help", "kernels", "check"), "Usage: ndcheck kernels check [OPTIONS]"),
        (("help", "run"), "Usage: ndcheck run [OPTIONS]"),
    ],
)
def test_help_is_on_stdout_in_lines(ndcheck_here, arguments, shown):
    done = ndcheck_here(*arguments)
    assert done.returncode == 0
    assert done.stdout.startswith(shown)
    assert r"\n" not in done.stdout
    assert done.stderr == ""


def test_the_mock_server_is_listed_with_its_faults(ndcheck_here):
    assert "mock-server" in ndcheck_here("help").stdout
    lines = ndcheck_here("help", "mock-server").stdout.splitlines()
    assert all(any(line.split()[:1] == [fault] for line in lines) for fault in FAULTS)


NO_HUB_IDS = ("1e+308", "a..b", "a--b", "é", " ", "a" * 97)
"""By the hub's own rule: letters, digits, - _ . and 96 characters at most, no -- and no .. ."""


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("help", "rnu"), "did you mean run?"),
        (("run", "ndcheck-runs/a-clean"), "ndcheck report ndcheck-runs/a-clean"),
        (("run", "models/llama"), "--model models/llama"),
        (("run", "http://127.0.0.1:1/v1"), "--endpoint http://127.0.0.1:1/v1"),
        (("order", "liner"), "did you mean linear?"),
        (("trace", "latest"), "extra argument(s) (latest): give --run latest"),
        (("trace", "my runs/a", "--step", "1"), "give --run 'my runs/a'"),
        (("shrink", "latest"), "Missing option '--run': give --run latest"),
        (("shrink",), "Missing option '--run': The run that failed, or latest."),
        (("compare", "latest"), "Missing argument 'B': The run to compare with it."),
        (("report",), "Missing argument 'DIR': A run's directory, or latest."),
        (("doctor", "latest"), "(latest); usage: ndcheck doctor [OPTIONS]"),
        (("kernels", "doctor"), "No such command 'doctor', did you mean ndcheck doctor?"),
        (("kernels", "chek"), "did you mean check?"),
        (("kernels", "list"), "did you mean ndcheck runs?"),
        (("kernels", "fly"), "there are check, bench, prove, manifest, compare"),
        (("check",), "did you mean ndcheck kernels check?"),
        (("kernels", "show", "latest"), "did you mean ndcheck report?"),
        (("diff", "a", "b"), "did you mean ndcheck compare?"),
        (("mock_server",), "did you mean ndcheck mock-server?"),
        (("version",), "did you mean ndcheck --version?"),
        (("rnu",), "No such command 'rnu', did you mean run?"),
        (("run", "--model", "./no-model"), "there is no such file or directory"),
        (("run", "--dtype", "float8"), "--dtype float8: choose from auto, bf16, fp16, fp32"),
        (("run", "--dtype", "fp61"), "did you mean fp16?"),
        (("run", "--base-url", "x"), "No such option: --base-url, did you mean --endpoint?"),
        (("score", "r", "--url", "x"), "No such option: --url, did you mean --endpoint?"),
        (("run", "--batch-size", "4"), "No such option: --batch-size, did you mean --loads?"),
        *((("run", "--model", name), "it is no hub id") for name in NO_HUB_IDS),
        (("trace", "--model", "1e+308"), "it is no hub id"),
        (("order", "mm", "--columns", "9" * 31), "give 1 to 999999"),
        (("run", "--loads", "8-1"), "'8-1' is an empty range"),
        (("run", "--loads", "1-8:x1"), "ranges such as 1-8 and 1-64:x2"),
        (("run", "--loads", "1-60000"), "more than 1000 batch sizes"),
    ],
)
def test_what_is_wrong_is_met_with_a_hint(ndcheck_here, two_runs, arguments, hint):
    done = ndcheck_here(*arguments)
    assert done.returncode == 2, done.stderr
    assert hint in done.stderr.splitlines()[-1]


def test_a_hub_that_does_not_answer_is_one_line(ndcheck_here, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # Both are as they were afterwards.
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    done = ndcheck_here("run", "--model", "nobody/no-model", "-q")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no such directory" in line
    assert "http://127.0.0.1:1 cannot be reached" in line


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1-8", (1, 2, 3, 4, 5, 6, 7, 8)),
        ("1-64:x2", (1, 2, 4, 8, 16, 32, 64)),
        ("3-30:x3, 1,40-41", (3, 9, 27, 1, 40, 41)),
    ],
)
def test_ranges_of_batch_sizes(text, sizes):
    assert parse_batch_sizes(text) == sizes


def test_ranges_of_widths():
    assert parse_widths("16,2-5") == (2, 3, 4, 5, 16)
    for wrong in ("5-2", "1-4", "2-1025", "2-3-4", "-3", "2,2-3"):
        with pytest.raises(UsageError, match="--widths"):
            parse_widths(wrong)


@pytest.mark.parametrize("options", [("-p", "-"), ("--prompt", "-"), ("--prompts-file", "-")])
def test_a_prompt_comes_from_standard_input(ndcheck_here, monkeypatch, options):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"SELECT 1;\n")))
    plan = ("run", "--model", "scripted:clean", "--loads", "1,2", "-n", "12", "--dry-run")
    assert "SELECT 1;" in ndcheck_here(*plan, *options).stdout


def test_dtypes_have_the_names_that_torch_gives_them(ndcheck_here):
    command = ("order", "sum", "--terms", "4", "--rows", "1", "-q", "--dtype")
    assert ndcheck_here(*command, "bfloat16").stdout == ndcheck_here(*command, "bf16").stdout
    plan = ("run", "--loads", "1,2", "-n", "12", "--max-tokens", "1", "--dry-run", "--dtype")
    assert ndcheck_here(*plan, "float16").returncode == 0


@pytest.mark.parametrize("command", ["report", "gate"])
def test_the_latest_run_is_the_one_that_began_last(ndcheck_here, two_runs, command):
    done = ndcheck_here(command, "latest")
    assert done.returncode == 0, done.stderr
    assert "ndcheck-runs/a-clean" in done.stdout
    other = ndcheck_here(command, "ndcheck-runs/b-fork")
    assert other.returncode == {"report": 0, "gate": 1}[command]
    assert ndcheck_here("report", "ndcheck-runs/b-fork", "--exit-code").returncode == 1


def test_without_runs_there_is_no_latest(ndcheck_here):
    done = ndcheck_here("report", "latest")
    assert done.returncode == 2
    assert "ndcheck-runs holds no run" in done.stderr


def test_a_shell_is_offered_values(ndcheck_here, two_runs):
    assert completion.some_of("all", *AXES)("slot,ca") == ["slot,cache"]
    assert completion.one_of("bf16", "fp16", "fp32")("fp") == ["fp16", "fp32"]
    assert completion.runs("ndcheck-runs/a") == ["ndcheck-runs/a-clean"]
    words = {"COMP_WORDS": "ndcheck run --axes sl", "COMP_CWORD": "3"}
    done = ndcheck_here(env={"_NDCHECK_COMPLETE": "complete_bash", **words})
    assert done.stdout.split() == ["slot"]
    assert list(REDUCTIONS) == list(OPS)


def test_a_misspelt_variable_is_said_and_another_tools_is_not(ndcheck_here):
    variables = {"NDCHECK_SAMPLE": "8", "NDCHECK_VLM": "1", "NDCHECK_OF_MY_PIPELINE": "1"}
    variables |= {"NDCHECK_LOADS": "1,2"}  # The control: it is read.
    done = ndcheck_here("run", "--model", "scripted:clean", "--dry-run", env=variables)
    assert [line for line in done.stderr.splitlines() if "did you mean" in line] == [
        "ndcheck: nothing reads NDCHECK_SAMPLE, did you mean NDCHECK_SAMPLES?",
        "ndcheck: nothing reads NDCHECK_VLM, did you mean NDCHECK_VLLM?",
    ]


@pytest.mark.parametrize("group", ["ndcheck", "ndcheck kernels"])
def test_the_list_of_commands_is_of_whole_sentences(ndcheck_here, group):
    """As each command's own help has it; typer cuts them to a line of the terminal."""
    command = [*group.split()[1:]]
    listed = ndcheck_here(*command, "--help", env={"COLUMNS": "80"}).stdout.partition("Commands:")[
        2
    ]
    assert "..." not in listed
    words = " ".join(listed.split())
    for name in re.findall(r"^  ([a-z-]+) ", listed, re.MULTILINE):
        own = ndcheck_here(*command, name, "--help", env={"COLUMNS": "80"}).stdout
        whole = " ".join(own.partition("\n\n")[2].partition("\n\n")[0].split())
        assert f"{name} {whole.partition('. ')[0]}" in words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "-n", "1e3"), "--samples 1e3: give a whole number"),
        (("run", "-n", "8", "-n1k"), "--samples 1k: give a whole number"),
        (("run", "--max-tokens=1,000", "-n", "8"), "--max-tokens 1,000: give a whole number"),
        (("gate", "R", "--max-divergence-rate", "5%"), "--max-divergence-rate 5%: give a number"),
        (("run", "--temperature", "zero"), "--temperature zero: give a number"),
        (("run",), "NDCHECK_SEED=0x10: give a whole number"),
    ],
)
def test_what_is_no_number_is_repeated_with_what_is_one(ndcheck_here, arguments, said):
    done = ndcheck_here(*arguments, env={} if len(arguments) > 1 else {"NDCHECK_SEED": "0x10"})
    assert done.returncode == 2
    assert done.stderr.startswith(f"ndcheck: {said}")
