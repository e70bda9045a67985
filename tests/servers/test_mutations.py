"""Spoilt answers, a bounded part of tests/benchmarks/server_answers.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "server_answers.py"))


@pytest.mark.parametrize("kinds", SCRIPT["KINDS"], ids="+".join)
@pytest.mark.parametrize("seed", [1, 2])
def test_spoilt_answers_end_in_a_verdict_or_one_line(kinds, seed, monkeypatch):
    monkeypatch.setattr("ndcheck.samplers.endpoint.client.FIRST_PAUSE_S", 0.01)
    code, tally, screen = SCRIPT["run_once"](seed, kinds)
    assert isinstance(code, int), code
    assert not SCRIPT["is_wrong"](code, tally, kinds), (code, tally, screen[-2000:])
