"""`ndcheck kernels check` shared between processes: the same findings, and no PASS of fewer."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ndcheck.cli import kernels_checks, kernels_session
from ndcheck.reports import kernels as report

OPTIONS = ("kernels", "check", "--device", "cpu", "--rows", "1,17", "--op", "linear,softmax")


@pytest.fixture
def workers(monkeypatch, warm_python, processes_of):
    """The processes that were started; they need import nothing."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "executable", warm_python())
    return processes_of("ndcheck.cli.kernels_checks")


@pytest.fixture
def two_processes(workers, monkeypatch):
    monkeypatch.setattr(kernels_session, "choose_processes", lambda device, n_cases: 2)
    return workers


def test_two_processes_find_what_one_does(ndcheck_here, workers, monkeypatch, tmp_path):
    outputs = []
    for n in (1, 2):
        monkeypatch.setattr(kernels_session, "choose_processes", lambda *_, n=n: n)
        done = ndcheck_here(*OPTIONS, "--csv", f"{n}.csv")
        assert done.returncode == 0, done.stderr
        assert "PASS  9 of 9 have one bit class" in done.stdout
        outputs.append((done.stdout, Path(f"{n}.csv").read_text()))
        assert len(workers) == 2 * (n - 1)
    assert outputs[0] == outputs[1]
    assert all(process.poll() is not None for process in workers)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_killed_process_makes_no_pass(ndcheck_here, two_processes, monkeypatch, as_json):
    receive = kernels_checks.WorkerProcess.receive
    n_received = 0

    def receive_and_kill(self):
        nonlocal n_received
        answer, n_received = receive(self), n_received + 1
        if n_received == 4:
            two_processes[1].kill()
        return answer

    monkeypatch.setattr(kernels_checks.WorkerProcess, "receive", receive_and_kill)
    done = ndcheck_here(*OPTIONS, *(["--json"] if as_json else []))
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert line == "ndcheck: process 2 of 2, which checked kernels, was killed by SIGKILL"
    assert "INCONCLUSIVE" in done.stdout
    if not as_json:
        assert "\nPASS" not in done.stdout
        assert "of 9 have one bit class" in done.stdout
    assert all(process.poll() == -signal.SIGKILL for process in two_processes)


def test_an_exception_in_a_process_is_the_line_that_it_is_in_one(
    ndcheck_here, two_processes, monkeypatch
):
    # torch draws no numbers of 8 bits.
    wrong = (0, torch.float8_e5m2)
    check_all = kernels_session.check_all
    lines = []
    for n in (1, 2):
        monkeypatch.setattr(
            kernels_session,
            "check_all",
            lambda work, *rest, n=n: check_all([*work[:8], wrong], *rest[:2], n),
        )
        done = ndcheck_here(*OPTIONS)
        assert done.returncode == 4
        (line,) = done.stderr.splitlines()
        assert "unexpected NotImplementedError: " in line
        assert "\nPASS" not in done.stdout
        lines.append(line)
    assert lines[0] == lines[1]
    assert len(two_processes) == 2


@pytest.mark.parametrize("fits_alone", [True, False])
def test_what_finds_no_memory_beside_others_is_computed_alone(
    ndcheck_here, two_processes, monkeypatch, fits_alone
):
    """As where each of two processes holds a part of a GPU's memory."""
    receive = kernels_checks.WorkerProcess.receive
    n_received = 0

    def receive_or_run_out(self):
        nonlocal n_received
        answer, n_received = receive(self), n_received + 1
        is_first, is_last = n_received == 2, n_received == 10
        if is_first or (is_last and not fits_alone):
            return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB"), []
        return answer

    monkeypatch.setattr(kernels_checks.WorkerProcess, "receive", receive_or_run_out)
    done = ndcheck_here(*OPTIONS)
    assert n_received == 10
    if fits_alone:
        assert "PASS  9 of 9 have one bit class" in done.stdout
        assert done.returncode == 0
    else:
        assert done.returncode == 4
        assert "out of memory" in done.stderr
        assert "\nPASS" not in done.stdout


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError()])
def test_a_process_answers_that_it_found_no_memory(monkeypatch, error):
    """Without the frames, which would keep what there was memory for."""

    calls = []

    def run_out(*_):
        raise error

    parent = SimpleNamespace(receive=lambda: (torch.device("cpu"), (1,), 1), answer=calls.append)
    monkeypatch.setattr(kernels_checks, "Parent", lambda: parent)
    monkeypatch.setattr("ndcheck_kernels.measure.check.check", run_out)
    kernels_checks.main()
    assert calls.pop()(0, torch.float32) == (error, [])
    assert error.__traceback__ is None


def test_an_interrupt_leaves_no_process_and_no_pass(ndcheck_here, two_processes, monkeypatch):
    kept = report.check_rows

    def interrupt(finding):
        if finding.dtype == "float32":
            raise KeyboardInterrupt
        return kept(finding)

    monkeypatch.setattr(report, "check_rows", interrupt)
    done = ndcheck_here(*OPTIONS)
    assert (done.returncode, done.stderr) == (130, "")
    assert "\nINCONCLUSIVE  3 of 9 have one bit class" in done.stdout
    assert all(process.poll() == -signal.SIGKILL for process in two_processes)


@pytest.mark.parametrize(
    ("n_cases", "gigabytes", "n_cores", "expected"),
    [
        (96, 64, 2, 2),
        (96, 64, 64, 8),
        (96, 5, 64, 2),
        (96, 1, 64, 1),
        (15, 64, 8, 1),
        (0, 64, 8, 1),
    ],
)
def test_how_many_processes(monkeypatch, n_cases, gigabytes, n_cores, expected):
    from ndcheck.samplers.local import memory

    monkeypatch.setattr(memory, "free_bytes", lambda device: gigabytes << 30)
    monkeypatch.setattr(kernels_checks.os, "sched_getaffinity", lambda pid: set(range(n_cores)))
    assert kernels_checks.choose_processes(torch.device("cpu"), n_cases) == expected
