"""The command line as a user has it: a subprocess in an empty directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest


@pytest.fixture
def environment():
    ours = ("NDCHECK_", "TRITON_INTERPRET")  # the interpreter is for kernel tests alone
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "COLUMNS": "80", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


@pytest.fixture
def ndcheck(tmp_path, environment, warm_python):
    """Runs ``ndcheck ARGUMENTS`` in ``tmp_path`` and returns the finished process.

    Its imports are done already, unless ``python=sys.executable`` is given.
    """

    def run(*arguments, python=None, **options):
        return subprocess.run(
            [python or warm_python(), "-m", "ndcheck", *map(str, arguments)],
            cwd=tmp_path,
            env={**environment, **options.pop("env", {})},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **options,
        )

    return run


@pytest.fixture
def ndcheck_here(tmp_path, monkeypatch, capsys):
    """The same in this process, for many small cases: to start one takes seconds."""
    from ndcheck.cli.app import run_command_line

    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments, env=None):
        with monkeypatch.context() as patch:
            for name, value in {"COLUMNS": "80", **(env or {})}.items():
                patch.setenv(name, value)
            code = run_command_line([*map(str, arguments)])
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def started(tmp_path, environment):
    """Starts ``ndcheck ARGUMENTS`` and returns the running process; it is killed at the end."""
    processes = []

    def start(*arguments, python=sys.executable, **variables):
        process = subprocess.Popen(
            [python, "-m", "ndcheck", *map(str, arguments)],
            cwd=tmp_path,
            env={**environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def wait_for_lines():
    """Waits until a running process has written so many lines of samples."""

    def wait(process, path, n_lines):
        for _ in range(600):
            if path.exists() and path.read_bytes().count(b"\n") >= n_lines:
                return
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        raise AssertionError("no samples appeared")

    return wait
