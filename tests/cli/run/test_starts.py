"""How runs begin: each in a directory of its own, at once refused if too large, or begun again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time

import pytest

from ndcheck.errors import UsageError
from ndcheck.storage.run_directory import NewDirectory, remove_leftovers

SCRIPTED = ("--model", "scripted:clean", "--max-tokens", "8", "--loads", "1,4", "-n", "40", "-q")


def assert_one_line(done, code, *parts):
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("ndcheck: ")
    for part in parts:
        assert part in line


def test_starts_in_the_same_second_get_a_directory_each(started, warm_python, tmp_path):
    python = warm_python()
    processes = [started("run", *SCRIPTED, python=python) for _ in range(3)]
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert (process.returncode, stderr) == (0, "")
    runs = list((tmp_path / "ndcheck-runs").iterdir())
    assert len(runs) == 3
    assert all((run / "run.json").exists() for run in runs)


def test_a_name_is_taken_by_one_alone(tmp_path):
    """Whatever the clock says: the same name for all."""
    taken = [NewDirectory.take_free(tmp_path / "runs" / "name") for _ in range(3)]
    assert [new.path.name for new in taken] == ["name", "name-2", "name-3"]
    with pytest.raises(UsageError, match="another ndcheck is writing"):
        NewDirectory.take(tmp_path / "runs" / "name-2")
    for new in reversed(taken):
        new.close()
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_leaves_nothing(ndcheck_here, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in ((), ("--out", "new/deep"), ("--out", "empty")):
        assert_one_line(ndcheck_here("run", "--model", "./none", "-q", *out), 2, "--model")
        assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_start_that_is_killed_is_begun_again_as_its_message_says(ndcheck, started, tmp_path):
    process = started("run", "--loads", "1,2", "-n", "4", "--max-tokens", "4", "--out", "run")
    while not (tmp_path / "run" / "samples.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "run" / ".run.json.abcd1234.tmp").write_text("{")
    if not (tmp_path / "run" / "run.json").exists():
        done = ndcheck("run", "--resume", "run")
        assert_one_line(done, 2, "begin it again with --out run")
    done = ndcheck("run", *SCRIPTED, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "run").glob(".*"))


def test_a_directory_that_holds_anything_else_is_left_alone(ndcheck_here, tmp_path):
    for name, content in (("samples.jsonl", "x"), ("notes.txt", ""), (".hidden", "")):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).write_text(content)
        assert_one_line(ndcheck_here("run", *SCRIPTED, "--out", "run"), 2, "is not empty")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [name]
        shutil.rmtree(tmp_path / "run")


def test_temporary_files_of_killed_reports_go_and_those_in_use_stay(ndcheck_here, tmp_path):
    ndcheck_here("run", *SCRIPTED, "--out", "run")
    folder = tmp_path / "run"
    dead, alive, other = (
        folder / name for name in (".report.md.abcd1234.tmp", ".loads.csv.abcd1234.tmp", ".mine")
    )
    for path in (dead, alive, other):
        path.write_text("half")
    with alive.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ndcheck_here("report", "run").returncode == 0
        assert [path.name for path in sorted(folder.glob(".*"))] == [alive.name, other.name]
    remove_leftovers(folder)
    assert [path.name for path in sorted(folder.glob(".*"))] == [other.name]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--loads", "1,999999999"), "--loads 999999999"),
        (("--loads", "9" * 5000), "--loads 99999"),
        (("--loads", "99999"), "--loads 99999"),
        (("-n", "999999999"), "--samples 999999999"),
        (("-n", "900000", "--loads", "1,9999"), "rows"),
        (("-n", "600000", "--kernels", "stock,invariant"), "probes and arms (2 here)"),
        (("--target-rate", "1e-300"), "--target-rate"),
        (("--target-rate", "0.0000001"), "--target-rate"),
        (("--confidence", "0.9999999999999999", "--target-rate", "0.00001"), "--target-rate"),
    ],
)
def test_a_plan_that_is_too_large_is_refused_before_anything_is_planned(
    ndcheck_here, monkeypatch, tmp_path, options, part
):
    from ndcheck import runner

    monkeypatch.setattr(runner, "plan_trials", None)
    for verb in (("run", "-q"), ("run", "--dry-run")):
        done = ndcheck_here(*verb, "--model", "scripted:clean", *options)
        assert_one_line(done, 2, part)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "code", "part"),
    [
        (("run", *SCRIPTED, "--out", "x" * 300), 2, "File name too long"),
        (("run", *SCRIPTED, "--out", "/proc/nothing/here"), 4, "/proc/nothing"),
        (("run", *SCRIPTED, "--out", "/dev/null/x"), 4, "Not a directory"),
        (("run", *SCRIPTED, "--out", "/dev/null"), 2, "is a file"),
        (("run", "--resume", "x" * 300), 2, "File name too long"),
        (("report", "x" * 300), 2, "File name too long"),
        (("gate", "x" * 300), 2, "File name too long"),
        (("gate", "--config", "x" * 300), 2, "File name too long"),
        (("compare", "x" * 300, "y"), 2, "File name too long"),
        (("runs", "x" * 300), 2, "File name too long"),
        (("trace", "--run", "x" * 300), 2, "File name too long"),
        (("shrink", "--run", "x" * 300), 2, "File name too long"),
        (("run", "-q", "--model", "x" * 300), 2, "--model"),
        (("run", "--prompts-file", "x" * 300), 2, "File name too long"),
    ],
)
def test_paths_that_cannot_be_used(ndcheck_here, tmp_path, command, code, part):
    assert_one_line(ndcheck_here(*command), code, part)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def as_nobody():
    """Root may read everything, and tests run as root in most containers."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    yield
    os.seteuid(os.getuid())


def test_folders_that_may_not_be_read(ndcheck_here, tmp_path_factory, request):
    root = tmp_path_factory.mktemp("rights")
    for parent in (root.parent.parent.parent, root.parent.parent, root.parent, root):
        if parent.stat().st_uid == os.geteuid():
            parent.chmod(parent.stat().st_mode | 0o55)
    (root / "secret").mkdir(mode=0o700)
    (root / "fixed").mkdir(mode=0o555)
    secret = root / "secret" / "run"
    commands = (
        (("report", secret), 2),
        (("gate", secret), 2),
        (("compare", secret, secret), 2),
        (("run", *SCRIPTED, "--out", secret), 2),
        (("run", *SCRIPTED, "--out", root / "fixed" / "run"), 4),
        (("runs", secret.parent), 4),
    )
    for command, _ in commands:  # What is imported late may lie where nobody may read.
        ndcheck_here(*command)
        shutil.rmtree(secret, ignore_errors=True)
        shutil.rmtree(root / "fixed" / "run", ignore_errors=True)
    (root / "secret").chmod(0 if os.geteuid() else 0o700)
    request.getfixturevalue("as_nobody")
    for command, code in commands:
        assert_one_line(ndcheck_here(*command), code, "Permission denied")


def test_a_run_in_the_current_directory_has_its_name(ndcheck_here, tmp_path):
    done = ndcheck_here("run", *SCRIPTED, "--out", ".")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run.json").read_text())["run_id"] == tmp_path.name


def test_a_name_that_cannot_be_recorded_is_refused(ndcheck_here, tmp_path):
    done = ndcheck_here("run", *SCRIPTED, "--out", os.fsdecode(b"\xff"))
    assert_one_line(done, 2, "--out", "not valid UTF-8")
    assert list(tmp_path.iterdir()) == []
