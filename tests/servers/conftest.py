"""Servers over loopback: the mock in a thread of this process, and what a run finds of it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing, suppress
from dataclasses import replace

import pytest

from ndcheck.analysis.summarising import summarise
from ndcheck.judging.verdict import judge
from ndcheck.mock_server.server import MockServer, Plan
from ndcheck.records import Decoding, Endpoint, Environment, Run
from ndcheck.request import DEFAULTS
from ndcheck.runner import fit_spec, plan, run_trials
from ndcheck.samplers.base import open_sampler
from ndcheck.storage.run_directory import RunDirectory, SampleReader

SPEC = replace(
    DEFAULTS, model="mock", arms=("stock",), decoding=Decoding(12), batch_sizes=(1, 3), n_samples=22
)


@pytest.fixture
def mock():
    """Starts mock servers; ``mock(fault=..., ...)`` is the address of one."""
    stops = []

    def start(**plan):
        listening = threading.Event()
        state = {}

        async def serve():
            state["task"] = asyncio.current_task()
            state["loop"] = asyncio.get_running_loop()

            def announce(port):
                state["port"] = port
                listening.set()

            await MockServer(Plan(**{"step_s": 0.003, **plan})).serve("127.0.0.1", 0, announce)

        def run():
            with suppress(asyncio.CancelledError):
                asyncio.run(serve())

        thread = threading.Thread(target=run)
        thread.start()
        assert listening.wait(10)
        stops.append((thread, state))
        return f"http://127.0.0.1:{state['port']}/v1"

    yield start
    for thread, state in stops:
        state["loop"].call_soon_threadsafe(state["task"].cancel)
        thread.join(10)


@pytest.fixture
def sampler():
    """Opens samplers of a server; they are closed at the end."""
    opened = []

    def open_one(url, private=None, **changed):
        options = {k: changed.pop(k) for k in list(changed) if k in Endpoint.__dataclass_fields__}
        spec = replace(SPEC, endpoint=Endpoint(url, **options), **changed)
        opened.append(open_sampler(spec, private=private))
        return opened[-1], spec

    yield open_one
    for one in opened:
        one.close()


@pytest.fixture
def measure(tmp_path, sampler):
    """Plans, runs, stores, reads back and judges: the run's judgement, summary and samples."""

    def measure(url, **changed):
        opened, spec = sampler(url, **changed)
        spec = fit_spec(spec, opened)
        trials = plan(spec, opened)
        run = Run("r", "0", spec, Environment(model=opened.describe()), "")
        with closing(RunDirectory.create(tmp_path / "run", run)) as directory:
            run = run_trials(trials, opened, directory)
        samples = list(SampleReader(tmp_path / "run"))
        summary = summarise(samples, spec)
        return judge(run, summary), summary, samples

    return measure


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Starts real servers: ``serve(command, **variables)`` with ``PORT`` in it is the address."""
    processes = []

    def start(*command, **variables):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        log = tmp_path_factory.mktemp("server") / "log.txt"
        with log.open("w") as output:
            process = subprocess.Popen(
                [port if part == "PORT" else str(part) for part in command],
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            else:
                return f"http://127.0.0.1:{port}/v1"
        raise AssertionError(log.read_text())

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def run_against(tmp_path, warm_python):
    """``ndcheck run --endpoint`` to its end: exit code, stderr, samples as read from the file."""

    def run(url, *options):
        command = [warm_python(), "-m", "ndcheck", "run", "--endpoint", url, "--out", "run"]
        done = subprocess.run(
            [*command, *map(str, options)],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        text = (tmp_path / "run" / "samples.jsonl").read_text()
        samples = [json.loads(line) for line in text.splitlines()]
        assert not [sample["error"] for sample in samples if sample["error"]]
        return done.stderr, samples

    return run
