"""Of thousands of prompts the worst are shown, the rest counted and left to the CSV files."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ndcheck.records import Probe
from ndcheck.reports.markdown import MAX_PROBES, markdown_report
from ndcheck.reports.ranking import tally, worst_first
from ndcheck.reports.terminal import print_report
from ndcheck.request import DEFAULTS

N = 10_000
RATES = {1234: 0.9, 77: 0.5, 4321: 0.5, 9999: 0.1}
"""Of those that fail, by number; 77 parts earlier than 4321."""


@pytest.fixture
def crowd(failing, passing):
    """Ten thousand prompts, of which four fail."""
    good, bad = passing.summary.probes[0], failing.summary.probes[0]
    verdicts = {False: passing.judgement.probes[0], True: failing.judgement.probes[0]}
    names = {i: f"q{i}" for i in range(N)}
    spec = replace(passing.run.spec, probes=tuple(Probe(n, f"ask {n}") for n in names.values()))
    probes = tuple(
        replace(bad, probe_id=name, divergence_rate=RATES[i], common_prefix_tokens=50 + (i > 99))
        if i in RATES
        else replace(good, probe_id=name, arm=bad.arm)
        for i, name in names.items()
    )
    judged = tuple(
        replace(verdicts[i in RATES], arm=bad.arm, probe_id=name) for i, name in names.items()
    )
    return replace(
        failing,
        run=replace(failing.run, spec=replace(spec, arms=(bad.arm,))),
        summary=replace(failing.summary, probes=probes),
        judgement=replace(failing.judgement, probes=judged),
        directory=Path("runs/a"),
    )


def test_the_worst_come_first(crowd):
    first = [probe.probe_id for probe in worst_first(crowd)[:5]]
    assert first == ["q1234", "q77", "q4321", "q9999", "q0"]
    assert tally(crowd.summary.probes, crowd) == "10000 prompts: 4 FAIL, 9996 PASS"


def test_a_screen_of_thousands_is_one_screen(crowd):
    file = io.StringIO()
    print_report(Console(file=file, width=80), crowd, DEFAULTS)
    lines = file.getvalue().splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [
        ["FAIL", "q1234"], ["FAIL", "q77"], ["FAIL", "q4321"], ["FAIL", "q9999"], ["PASS", "q0"],
    ]  # fmt: skip
    assert [line.strip() for line in lines[8:10]] == [
        "and 9992 more in summary.csv",
        "10000 prompts: 4 FAIL, 9996 PASS",
    ]
    assert len(lines) < 100


def test_a_report_of_thousands_has_the_worst(crowd):
    text = markdown_report(crowd, DEFAULTS)
    headings = [line for line in text.splitlines() if line.startswith("## Findings: ")]
    assert len(headings) == MAX_PROBES
    assert headings[0] == "## Findings: q1234"
    assert f"has the worst {MAX_PROBES}, and the CSV files beside it have them all" in text
