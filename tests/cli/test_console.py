"""What nobody expected ends in one line and exit code 4; 1 is for findings alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest

import ndcheck

SURPRISES = {
    "KeyError": KeyError("place"),
    "AssertionError": AssertionError(),
    "MemoryError": MemoryError(),
    "out of memory": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "RecursionError": RecursionError("maximum recursion depth exceeded"),
    "EOFError": EOFError("Ran out of input"),
    "BrokenPipeError": BrokenPipeError(32, "Broken pipe"),
    "OSError": OSError(24, "Too many open files", "some/file"),
    "a library's exit 1": SystemExit(1),
    "a library's exit 0": SystemExit(0),
    "UnicodeEncodeError": UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
    "an exception group": ExceptionGroup("several", [ValueError("one\ntwo")]),
    "a warning": DeprecationWarning("old"),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    for name, verdict in (("clean", "PASS"), ("batch-dependent", "FAIL")):
        settings = {"loads": [1, 4], "samples": 40, "max_tokens": 8}
        run = ndcheck.measure(f"scripted:{name}", **settings, out=folder / name)
        assert run.verdict == verdict
    return folder


@pytest.fixture
def runs(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("name", SURPRISES)
def test_a_surprise_is_one_line_and_exit_code_4(ndcheck_here, runs, monkeypatch, name):
    from ndcheck.cli import run_session

    def report(*arguments, **options):
        raise SURPRISES[name]

    monkeypatch.setattr(run_session, "report", report)
    done = ndcheck_here("report", "clean")
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert line.startswith("ndcheck: ")
    if name in ("MemoryError", "out of memory"):
        assert "out of memory" in line
        assert "report it" not in line
    elif name not in ("OSError", "BrokenPipeError"):
        assert type(SURPRISES[name]).__name__ in line
        assert "NDCHECK_DEBUG=1" in line
    done = ndcheck_here("report", "clean", env={"NDCHECK_DEBUG": "1"})
    assert "Traceback" in done.stderr
    assert done.returncode == 4


def test_ctrl_c_anywhere_is_130(ndcheck_here, runs, monkeypatch):
    from ndcheck.cli import run_session

    def report(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_session, "report", report)
    assert ndcheck_here("report", "clean").returncode == 130


@pytest.mark.parametrize("name", SURPRISES)
def test_a_gate_goes_on_after_a_crash(ndcheck_here, runs, monkeypatch, tmp_path, name):
    from ndcheck.cli import gate_session

    def crash(label, run, *rest, judge=gate_session._judge):
        if label == "clean":
            raise SURPRISES[name]
        return judge(label, run, *rest)

    monkeypatch.setattr(gate_session, "_judge", crash)
    summary = {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    done = ndcheck_here("gate", "clean", "batch-dependent", "--junit", "j.xml", env=summary)
    assert done.returncode == 1
    root = ET.parse(tmp_path / "j.xml").getroot()
    assert [suite.get("name") for suite in root] == ["clean", "batch-dependent"]
    assert root[0].get("errors") == "1"
    assert "ERROR: clean" in (tmp_path / "summary.md").read_text()
    # Without a finding, the crash alone decides.
    assert ndcheck_here("gate", "clean").returncode == 4
    monkeypatch.undo()
    assert ndcheck_here("gate", tmp_path / "clean").returncode == 0


def test_a_gate_of_checks_goes_on_after_a_crash(ndcheck_here, monkeypatch, tmp_path):
    from ndcheck.cli import gate_session

    checks = "\n".join(
        f'[checks.{name}]\nmodel = "scripted:clean"\nmax_tokens = 8\nloads = [1, 4]\nsamples = 40'
        for name in ("first", "second")
    )
    (tmp_path / "ndcheck.toml").write_text(checks)

    def crash(spec, new, *rest, measure=gate_session.measure_spec):
        if new.path.name.endswith("first"):
            raise RuntimeError("boom")
        return measure(spec, new, *rest)

    monkeypatch.setattr(gate_session, "measure_spec", crash)
    done = ndcheck_here("gate", "--json", "--quiet", "--junit", "j.xml")
    assert done.returncode == 4
    first, second = json.loads(done.stdout)["checks"]
    assert "RuntimeError: boom" in first["error"]
    assert second["verdict"] == "PASS"
    assert len(ET.parse(tmp_path / "j.xml").getroot()) == 2


def ends(environment, folder, command, redirections):
    """The exit code of a shell's command, and its stderr where that is open."""
    ndcheck = f"{sys.executable} -m ndcheck"
    script = f"{ndcheck} {command} {redirections}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    return done.returncode, done.stderr


COMMANDS = {
    "gate clean --json": 0,
    "report clean --exit-code": 0,
    "gate batch-dependent --json": 1,
    "runs .": 0,
    "--help": 0,
}
READER_LEAVES = "| (exec <&-; sleep 0.1); exit ${PIPESTATUS[0]}"


@pytest.mark.parametrize("redirections", [READER_LEAVES, ">&-", "2>&-", "<&- >&- 2>&-"])
def test_an_output_that_nobody_reads_changes_no_exit_code(
    runs, environment, tmp_path, redirections
):
    # One of each way to write, and each code that a gate and a report have in common once.
    for command in ("gate batch-dependent --json", "report clean --exit-code", "runs .", "--help"):
        ended = ends(environment, tmp_path, command, redirections)
        assert ended == (COMMANDS[command], ""), command


@pytest.mark.parametrize("command", [c for c, code in COMMANDS.items() if code == 0])
def test_a_full_disk_under_stdout_is_said(runs, environment, tmp_path, command):
    code, stderr = ends(environment, tmp_path, command, ">/dev/full")
    assert (code, stderr) == (4, "ndcheck: stdout: No space left on device\n")


def test_a_finding_is_one_even_on_a_full_disk(runs, environment, tmp_path):
    assert ends(environment, tmp_path, "gate batch-dependent", ">/dev/full")[0] == 1
    assert ends(environment, tmp_path, "gate batch-dependent", ">/dev/full 2>/dev/full")[0] == 1
    assert ends(environment, tmp_path, "gate clean", ">/dev/null 2>/dev/full")[0] == 0


def test_closed_streams_never_let_a_run_write_into_its_own_samples(environment, tmp_path):
    """A file that is opened takes the number of a stream that was closed."""
    options = "--model scripted:clean --loads 1,4 -n 40 --max-tokens 8 --out run"
    assert ends(environment, tmp_path, f"run {options}", "<&- >&- 2>&-")[0] == 0
    assert ends(environment, tmp_path, "gate run", "")[0] == 0


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("import threading as t\nt.Thread(target=lambda: 1 / 0).start()", "ZeroDivisionError"),
        ("import gc\nclass C:\n def __del__(self): 1 / 0\nC(); gc.collect()", ""),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGINT)", ""),
    ],
)
def test_what_happens_beside_the_command(environment, tmp_path, code, line):
    """A thread that dies leaves nothing to trust; what is collected too late harms nothing."""
    script = (
        "from ndcheck.cli import console\n"
        f"def action():\n exec({code!r})\n return 0\n"
        "raise SystemExit(console.main(action))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == (4 if line else 130 if "SIGINT" in code else 0), done.stderr
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == bool(line)


def test_a_warning_of_a_library_is_a_line_like_others(environment, tmp_path):
    script = (
        "from ndcheck.cli import console\n"
        "import warnings\n"
        "def action():\n warnings.warn('it is\\n  slow', UserWarning)\n return 0\n"
        "raise SystemExit(console.main(action))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "ndcheck: warning: it is slow\n")


def test_warnings_turned_errors(environment, tmp_path, runs):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "ndcheck", "gate", "clean"], cwd=tmp_path,
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 4), done.stderr
    assert "Traceback" not in done.stderr


def test_a_deleted_working_directory(environment, tmp_path):
    (tmp_path / "gone").mkdir()
    command = f"cd gone && rmdir ../gone && {sys.executable} -m ndcheck runs ."
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1:] == [
        "ndcheck: the current directory cannot be used (No such file or directory): change to "
        "another"
    ]


def test_few_file_descriptors(environment, tmp_path, runs):
    for n in (5, 8, 12, 20):
        command = f"ulimit -n {n}; exec {sys.executable} -m ndcheck gate clean"
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode in (0, 4), (n, done.stderr)
        assert "Traceback" not in done.stderr
        if done.returncode:
            assert "Too many open files" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("word", ["complete_bash", "source_bash", "complete_zsh", "nonsense"])
def test_a_shell_that_asks_for_completions(ndcheck, word):
    done = ndcheck(env={"_NDCHECK_COMPLETE": word, "COMP_WORDS": "ndcheck ga", "COMP_CWORD": "1"})
    assert done.returncode in (0, 4)
    assert "Traceback" not in done.stderr


def test_standard_streams_may_not_block(environment, tmp_path, runs):
    """A pipe that is full and does not block: everything arrives, as to any other."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    process = subprocess.Popen(
        [sys.executable, "-m", "ndcheck", "report", "clean", "--json"], cwd=tmp_path,
        env=environment, stdout=write, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as pipe:
        assert json.load(pipe)["verdict"] == "PASS"
    assert process.communicate()[1] == ""
    assert process.returncode == 0
