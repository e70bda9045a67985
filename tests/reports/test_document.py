from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ndcheck.reports.document import make_document


@pytest.mark.parametrize(
    "name", ["failing", "two_arms", "passing", "inconclusive", "empty", "all_errors", "hostile"]
)
def test_it_is_strict_json(name, request) -> None:
    found = make_document(request.getfixturevalue(name))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["schema_version"] == 1


def test_what_it_says(two_arms) -> None:
    found = make_document(two_arms)
    assert found["run_id"] == "20261124-053329-1f3a"
    assert found["verdict"] == "FAIL"
    assert found["fisher_p"] == 0.00123
    stock, invariant = found["probes"]
    assert (stock["arm"], stock["diverged_trials"], stock["n_trials"]) == ("stock", 9, 28)
    assert (invariant["verdict"], invariant["slowdown_vs_stock"]) == ("PASS", 1.04)
    assert [axis["verdict"] for axis in stock["axes"]] == [
        *("PASS", "FAIL", "PASS", "FAIL", "PASS", "FAIL", "PASS")
    ]
    second = stock["completions"][1]
    assert (second["count"], second["first_divergence"], second["divergent_token"]) == (
        8,
        102,
        " New",
    )
    assert "token_ids" not in second
    assert second["text"].endswith(" born in New York City, on May 11, 1918.\n")
    assert set(stock["metrics"]) == {
        "TARr@N",
        "TARa@N",
        "Div_Index",
        "Avg_Std@top1_prob",
        "k1_kl",
        "k3_kl",
        "flip_rate_per_step",
    }


def test_infinities_are_null(passing) -> None:
    (probe,) = passing.summary.probes
    metrics = replace(probe.metrics, k1_kl=float("inf"), k3_kl=float("nan"))
    summary = replace(passing.summary, probes=(replace(probe, measure=lambda: metrics),))
    (found,) = make_document(replace(passing, summary=summary))["probes"]
    assert found["metrics"]["k1_kl"] is found["metrics"]["k3_kl"] is None


def test_evidence_on_a_property_not_asked_for_has_no_verdict(passing) -> None:
    (verdict,) = passing.judgement.probes
    asked = replace(verdict, axes={"slot": verdict.axes["slot"]})
    judgement = replace(passing.judgement, probes=(asked,))
    (found,) = make_document(replace(passing, judgement=judgement))["probes"]
    assert [axis["verdict"] for axis in found["axes"]] == [None, None, "PASS", *[None] * 4]
