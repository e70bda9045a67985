"""Spoilt answers, a bounded part of bench.reliability.server_answers."""

from __future__ import annotations

import pytest

from bench.reliability.server_answers import KINDS, is_wrong, run_once


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
@pytest.mark.parametrize("seed", [1, 2])
def test_spoilt_answers_end_in_a_verdict_or_one_line(kinds, seed, monkeypatch):
    monkeypatch.setattr("ndcheck.samplers.endpoint.client.FIRST_PAUSE_S", 0.01)
    code, tally, screen = run_once(seed, kinds)
    assert isinstance(code, int), code
    assert not is_wrong(code, tally, kinds), (code, tally, screen[-2000:])
