"""Servers over loopback: the mock in a thread of this process, and what a run finds of it."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing, suppress
from dataclasses import replace

import pytest

from ndcheck.analysis.accumulate import summarise
from ndcheck.load import plan_trials
from ndcheck.mock_server.server import MockServer, Plan
from ndcheck.records import Decoding, Endpoint, Environment, Run
from ndcheck.request import DEFAULTS
from ndcheck.runner import run_trials
from ndcheck.samplers.base import open_sampler
from ndcheck.store import RunDirectory, SampleReader
from ndcheck.verdict import judge

SPEC = replace(DEFAULTS, model="mock", decoding=Decoding(12), batch_sizes=(1, 3), n_samples=22)


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

    def open_one(url, headers=None, **changed):
        options = {k: changed.pop(k) for k in list(changed) if k in Endpoint.__dataclass_fields__}
        spec = replace(SPEC, endpoint=Endpoint(url, **options), **changed)
        opened.append(open_sampler(spec, headers=headers))
        return opened[-1], spec

    yield open_one
    for one in opened:
        one.close()


@pytest.fixture
def measure(tmp_path, sampler):
    """Plans, runs, stores, reads back and judges: the run's judgement, summary and samples."""

    def measure(url, **changed):
        opened, spec = sampler(url, **changed)
        if not opened.cache_states:
            spec = replace(spec, axes=tuple(axis for axis in spec.axes if axis != "cache"))
        lengths = {probe.probe_id: opened.count_tokens(probe.prompt) for probe in spec.probes}
        trials = plan_trials(spec, lengths, opened.context, cache_states=opened.cache_states)
        run = Run("r", "0", spec, Environment(model=opened.describe()), "")
        with closing(RunDirectory.create(tmp_path / "run", run)) as directory:
            run = run_trials(trials, opened, directory)
        samples = list(SampleReader(tmp_path / "run"))
        summary = summarise(samples, spec)
        return judge(run, summary), summary, samples

    return measure
