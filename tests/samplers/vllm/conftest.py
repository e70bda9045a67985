"""A sampler over the stand-in for vLLM in ``fake``, in real worker processes."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from ndcheck.records import Decoding, Engine, Probe
from ndcheck.request import DEFAULTS
from ndcheck.samplers.options import SCHEDULED_AXES

FAKE = Path(__file__).parent / "fake"
PROBE = Probe("p1", "the quick answer depends on order because sums are not associative")


@pytest.fixture
def spec():
    return replace(
        DEFAULTS,
        probes=(PROBE,),
        decoding=Decoding(8),
        batch_sizes=(1, 4),
        axes=SCHEDULED_AXES,
        n_samples=60,
        engine=Engine(),
    )


@pytest.fixture
def open_fake(monkeypatch, tmp_path):
    """``open_fake(spec, fault)``: a sampler whose engine has the planted fault."""
    from ndcheck.samplers.vllm.sampler import EngineSampler

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # logs that outlive a failure
    monkeypatch.syspath_prepend(str(FAKE))
    # Beside what it holds: ndcheck itself may be found by it.
    monkeypatch.setenv("PYTHONPATH", str(FAKE), prepend=os.pathsep)
    samplers = []

    def open_it(spec, fault="clean"):
        monkeypatch.setenv("FAKE_VLLM", fault)
        samplers.append(EngineSampler(spec, spec.engine))
        return samplers[-1]

    yield open_it
    for sampler in samplers:
        sampler.close()
