"""Whatever a run holds: where two completions differ, nothing passes, in no form of report."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ndcheck.analysis.summarising import summarise
from ndcheck.cli.console import EXIT_CODES
from ndcheck.cli.gate_session import exit_code
from ndcheck.findings import find
from ndcheck.judging.comparison import compare, judge_comparison
from ndcheck.judging.rules import Rules, RuleSet, judge_gate
from ndcheck.records import AXES, Decoding, Environment, Fault, Load, Run, Sample, Witness
from ndcheck.reports.comparison import print_comparison
from ndcheck.reports.figures import gather
from ndcheck.reports.gate import CheckResult, gate_markdown, print_gate
from ndcheck.reports.html.page import html_report
from ndcheck.reports.junit import junit_xml
from ndcheck.reports.listing import run_lines
from ndcheck.reports.markdown import markdown_report
from ndcheck.reports.terminal import print_report
from ndcheck.request import DEFAULTS

SPEC = replace(DEFAULTS, decoding=Decoding(3), batch_sizes=(1, 2), n_samples=9)
LOADS = (Load(1), Load(2), Load(2, (1,), (3,)), Load(2, (0, 1)), Load(1, cache_state="chunked"))
COUNT = re.compile(r"\b([1-9]\d*)(?:/| of )\d+")


ARMS = (("stock",), ("invariant",), ("stock", "invariant"))


@st.composite
def runs(draw, choices=ARMS):
    """A run of any shape: axes, baselines and loads at random, few differing completions."""
    arms = draw(st.sampled_from(choices))
    asked = draw(st.lists(st.sampled_from(AXES), min_size=1, unique=True))
    spec = replace(SPEC, arms=arms, axes=tuple(asked), allow_latent=draw(st.booleans()))
    if draw(st.booleans()):
        spec = replace(spec, batching="continuous")
    is_rare = draw(st.booleans())
    samples = []
    for trial_id in range(draw(st.integers(1, 9))):
        purpose = draw(st.sampled_from(("reference", "control", *AXES)))
        load = draw(st.sampled_from(LOADS[:1] if purpose == "control" else LOADS))
        baseline = draw(st.sampled_from((None, 0, *range(trial_id), 99)))
        arm = draw(st.sampled_from(arms))
        fault = Fault(0, 1) if purpose == "control" and draw(st.booleans()) else None
        for slot in load.slots:
            odd = draw(st.sampled_from((0,) * 6 * is_rare + (0, 1, 2)))
            bits = draw(st.sampled_from((0.0,) * 6 * is_rare + (0.0, -0.5)))
            recorded = draw(st.sampled_from((True, True, False)))
            tokens = (7, 8, 9)[: 3 - (odd == 2)] if odd != 1 else (7, 1, 9)
            failed = draw(st.sampled_from((False,) * 8 + (True,)))
            samples.append(
                Sample(
                    sample_id=len(samples),
                    trial_id=trial_id,
                    arm=arm,
                    probe_id="p1",
                    purpose=purpose,
                    baseline=baseline,
                    load=load,
                    slot=slot,
                    witness=Witness(load.batch_size),
                    token_ids=() if failed else tokens,
                    token_texts=() if failed else tuple(map(str, tokens)),
                    finish_reason="error" if failed else "length",
                    elapsed_s=1.0,
                    logprobs=(bits,) * len(tokens) if recorded and not failed else (),
                    fault=fault,
                    error="boom" if failed else None,
                )
            )
    return spec, samples


def oracle(samples, *, allow_latent):
    """Which arms hold two completions that differ, by comparing every pair of samples."""
    counted = [s for s in samples if s.role != "control" and s.error is None]
    found = set()
    for a, b in combinations(counted, 2):
        other_bits = a.logprobs and b.logprobs and a.logprobs != b.logprobs
        if a.arm == b.arm and (a.token_ids != b.token_ids or (other_bits and not allow_latent)):
            found.add(a.arm)
    return found


def record(spec):
    return Run("r", "0", spec, Environment(), "2026-11-24T08:06:20", status="finished")


def printed(show, *args):
    screen = io.StringIO()
    show(Console(file=screen, width=100, highlight=False), *args)
    return screen.getvalue()


def screens(findings, verdict):
    run, summary = findings.run, findings.summary
    result = CheckResult("check", "ndcheck run", verdict=verdict)
    row = {
        "name": "r",
        "verdict": findings.judgement.verdict.outcome,
        "status": "finished",
        "model": "m",
        "arms": run.spec.arms,
        "gate": None,
        "by_arm": [
            {
                "arm": "stock",
                "verdict": findings.judgement.verdict.outcome,
                "n_unique": max(p.n_unique for p in summary.probes),
                "diverged_trials": sum(p.diverged_trials for p in summary.probes),
                "latent_trials": 0,
                "n_trials": sum(p.n_trials for p in summary.probes),
            }
        ],
    }
    page = html_report(findings, gather(findings), DEFAULTS)
    visible = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
    yield printed(print_report, findings, DEFAULTS)
    yield markdown_report(findings, DEFAULTS)
    yield re.sub(r"</?(?:td|strong|th|small)[^>]*>", " ", visible)
    yield printed(print_gate, [result])
    yield gate_markdown([result])
    yield "\n".join(line.plain for line in run_lines([row]))


@given(runs())
@settings(deadline=None, max_examples=60)
def test_where_completions_differ_nothing_passes(drawn):
    check_that_nothing_passes(*drawn)


@pytest.mark.slow
@given(runs())
@settings(deadline=None, max_examples=1000)
def test_where_completions_differ_nothing_passes_in_a_thousand_runs(drawn):
    check_that_nothing_passes(*drawn)


def check_that_nothing_passes(spec, samples):
    differing = oracle(samples, allow_latent=spec.allow_latent)
    findings = find(record(spec), samples)
    judgement = findings.judgement
    verdict = judge_gate(findings.run, findings.summary, RuleSet())
    failed = {p.arm for p in judgement.probes if p.verdict.outcome == "FAIL"}
    assert failed == differing
    for arm in differing:
        rulings = [r for r in verdict.rulings if r.arm == arm]
        assert any(r.verdict.outcome == "FAIL" for r in rulings)
    if differing:
        assert EXIT_CODES[judgement.verdict.outcome] == 1
        assert exit_code([CheckResult("c", "", verdict=verdict)], "pass") == 1
        junit = ET.fromstring(junit_xml([CheckResult("c", "", verdict=verdict)], "pass"))
        assert int(junit.get("failures")) > 0
    elif judgement.verdict.outcome == "PASS":
        assert verdict.outcome == "PASS"
    for screen in screens(findings, verdict):
        for line in screen.splitlines():
            if "PASS" in line and not spec.allow_latent:
                # What diverged, or only its bits: "planted fault caught in 1 of 1" is neither.
                before_rest = line.partition("PASS")[2].partition("caught")[0]
                assert not COUNT.search(before_rest), line


@given(runs(ARMS[2:]), st.sampled_from(ARMS[:2]))
@settings(deadline=None)
def test_an_arm_that_is_not_judged_fails_too_unless_it_is_the_control(drawn, arms):
    spec, samples = drawn
    differing = oracle(samples, allow_latent=spec.allow_latent)
    verdict = judge_gate(record(spec), summarise(samples, spec), RuleSet(arms=arms))
    if differing - ({"stock"} if arms == ("invariant",) else set()):
        assert verdict.outcome == "FAIL"
    else:
        assert verdict.outcome != "FAIL"


@pytest.mark.parametrize("limits", [{"max_unique": 9}, {"max_divergence_rate": 0.999}])
@given(drawn=runs())
@settings(deadline=None, max_examples=50)
def test_what_a_limit_allows_is_called_accepted(limits, drawn):
    spec, samples = drawn
    run, summary = record(spec), summarise(samples, spec)
    verdict = judge_gate(run, summary, RuleSet(Rules(**limits)))
    has_diverged = any(probe.has_diverged for probe in summary.probes)
    assert (verdict.label == "PASS") <= (not has_diverged)
    for line in printed(print_gate, [CheckResult("c", "", verdict=verdict)]).splitlines():
        assert not re.search(r"\bPASS\b.*\b[1-9]\d* of \d+ \w+ diverged", line), line


@given(runs(), runs())
@settings(deadline=None, max_examples=50)
def test_a_comparison_passes_nothing_that_diverged(drawn_a, drawn_b):
    measured = (find(record(spec), samples).measured for spec, samples in (drawn_a, drawn_b))
    comparison = compare(*measured)
    verdicts = judge_comparison(comparison, ("tokens", "bits", "unique", "rate"), 0.95)
    for line in printed(print_comparison, ("a", "b"), comparison, verdicts).splitlines():
        assert not re.search(r"^PASS.*\b[1-9]\d* of \d+ \w+ diverged", line), line
    differing = oracle(drawn_b[1], allow_latent=True) & {d.b.arm for d in comparison.drifts}
    for verdict in verdicts.values():
        assert not (differing and verdict.label == "PASS"), verdict
