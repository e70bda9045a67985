"""Advice that can help: each line for a run where it would, and for one where it would not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ndcheck.findings import Findings
from ndcheck.judging.verdict import judge
from ndcheck.records import Decoding, Endpoint
from ndcheck.reports.wording.remedies import remedies
from ndcheck.request import DEFAULTS

SMALL = replace(DEFAULTS, decoding=Decoding(8), batch_sizes=(1, 3), n_samples=40, arms=("stock",))
HERE = {"class": "LlamaForCausalLM"}


def advice(measured, run=None):
    run = run or measured.run
    findings = Findings(run, (), measured.summary, judge(run, measured.summary))
    found = remedies(findings, DEFAULTS, "DIR", 100)
    return [(each.reason, " ".join(each.command)) for each in found]


def text(found):
    return "\n".join(f"{reason}: {command}" for reason, command in found)


def on(run, model=HERE, **spec):
    environment = replace(run.environment, model=model)
    return replace(run, environment=environment, spec=replace(run.spec, **spec))


def test_an_interrupted_run_goes_on_and_one_that_was_refused_does_not(measured):
    def refused(sample):
        return replace(sample, error="400 Bad Request", token_ids=(), token_texts=())

    partly = measured("clean", SMALL, status="failed")
    assert "--resume DIR" in text(advice(partly))
    found = text(advice(measured("clean", SMALL, change=refused, status="failed")))
    assert "--resume" not in found
    assert "Nothing was measured" in found
    assert "--resume DIR" in text(advice(measured("clean", SMALL, status="interrupted")))


def test_random_draws_are_not_sent_to_batch_invariant_kernels(measured):
    """Above temperature 0 on a server; and where one request alone differs when repeated."""
    server = {"server": "vLLM"}
    endpoint = Endpoint("http://127.0.0.1:1/v1")
    batch = measured("batch-dependent", SMALL)
    assert "VLLM_BATCH_INVARIANT" in text(advice(batch, on(batch.run, server, endpoint=endpoint)))
    warm = on(batch.run, server, endpoint=endpoint, decoding=Decoding(8, 0.7))
    found = advice(batch, warm)
    assert "INVARIANT" not in text(found)
    assert any("temperature" in reason and command for reason, command in found)
    alone = replace(SMALL, batch_sizes=(1,), axes=("run-to-run",))
    chance = measured("flaky", alone)
    assert chance.summary.probes[0].diverged_trials
    found = text(advice(chance, on(chance.run, server, endpoint=endpoint)))
    assert "INVARIANT" not in found
    assert "One request alone" in found
    assert "no random draw" in text(advice(chance, on(chance.run)))


def test_a_control_that_chance_parted_before_its_fault_says_nothing_of_the_set_up(measured):
    """`fork` gives another completion at first only, so that the commonest one is no baseline's."""
    chance = measured("fork", replace(SMALL, n_samples=60))
    control = chance.summary.probes[0].control
    assert control.n_caught < control.n_trials
    assert "went unseen" not in text(advice(chance))


@pytest.mark.parametrize(
    ("spec", "model", "is_advised"),
    [
        ({}, HERE, True),
        ({"batching": "continuous"}, HERE, False),
        ({"tensor_parallel": 2}, HERE, False),
        ({}, {}, False),
    ],
)
def test_trace_is_advised_where_it_accepts_the_run(measured, spec, model, is_advised):
    failing = measured("batch-dependent", SMALL)
    found = text(advice(failing, on(failing.run, model, **spec)))
    assert ("ndcheck trace --run DIR" in found) == is_advised
