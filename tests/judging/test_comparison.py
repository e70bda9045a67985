"""What changed between two runs, in how they were made and what they gave."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ndcheck.judging.comparison import FAIL_ON, Measured, compare, judge_comparison
from ndcheck.records import Environment, Probe


def verdicts(a, b, *kinds, confidence=0.95):
    found = judge_comparison(compare(a, b), kinds or FAIL_ON, confidence)
    return {name: verdict.outcome for name, verdict in found.items()}


def moved(by=1, at=2):
    """Changes one token of every completion from ``at`` on, or only its bits."""

    def change(sample):
        tokens = tuple(t + by * (i >= at) for i, t in enumerate(sample.token_ids))
        digests = tuple("f" * 16 if i == at else d for i, d in enumerate(sample.row_digests))
        logprobs = tuple(p - 0.25 * (i == at - 1) for i, p in enumerate(sample.logprobs))
        return replace(sample, token_ids=tokens, row_digests=digests, logprobs=logprobs)

    return change


def test_a_run_does_not_differ_from_itself(measured):
    found = compare(measured(), measured())
    assert found.changes == ()
    (drift,) = found.drifts
    assert (drift.kind, drift.bits_recorded, drift.n_shared_tokens) == ("none", True, 8)
    assert (drift.max_abs_dlogprob, drift.k1_kl, drift.k3_kl) == (0, 0, 0)
    assert drift.fisher_p == 1
    assert set(verdicts(measured(), measured()).values()) == {"PASS"}


def test_of_two_probes_with_one_prompt_each_has_its_partner(measured):
    def twice(first, second):
        """A run of two probes with the prompt of one, as a file may hold it twice."""
        (probe,) = second.run.spec.probes
        spec = replace(second.run.spec, probes=(probe, replace(probe, probe_id="p2")))
        (one,), (other,) = first.summary.probes, second.summary.probes
        summary = replace(second.summary, probes=(one, replace(other, probe_id="p2")))
        (reference,) = second.references.values()
        references = {("stock", name): reference for name in ("p1", "p2")}
        return Measured(replace(second.run, spec=spec), summary, references)

    clean, forks = measured(), measured("batch-dependent")
    assert verdicts(twice(clean, clean), twice(clean, clean), "unique") == {"unique": "PASS"}
    for b in (twice(forks, clean), twice(clean, forks)):
        assert verdicts(twice(clean, clean), b, "unique") == {"unique": "FAIL"}
    assert verdicts(twice(clean, clean), clean, "unique") == {"unique": "INCONCLUSIVE"}


def test_nothing_to_compare_is_no_equality(measured):
    empty = measured(
        change=lambda sample: replace(
            sample, token_ids=(), token_texts=(), logprobs=(), margins=(), row_digests=()
        )
    )
    assert verdicts(empty, empty, "tokens", "bits") == {
        "tokens": "INCONCLUSIVE",
        "bits": "INCONCLUSIVE",
    }


@pytest.mark.parametrize(("digits", "outcome"), [(None, "PASS"), (17, "PASS"), (4, "INCONCLUSIVE")])
def test_rounded_numbers_are_not_equal_bit_for_bit(measured, digits, outcome):
    served = Environment(model={"compared": "token ids", "logprob_digits": digits})
    a, b = measured(environment=served), measured(environment=served)
    assert verdicts(a, b, "tokens", "bits") == {"tokens": "PASS", "bits": outcome}
    # What differs although it was rounded does.
    moved_bits = measured(change=moved(by=0), environment=served)
    assert verdicts(a, moved_bits, "bits") == {"bits": "FAIL"}


def test_a_servers_text_is_compared_with_the_text_of_token_ids(measured):
    ours = measured()
    for compared, unit in (("token ids", "token"), ("text", "character")):
        where = Environment(model={"compared": compared})
        # Other ids for the same text, as what stands for tokens has.
        served = measured(
            change=lambda sample, by=compared == "text": replace(
                sample, token_ids=tuple(i + by for i in sample.token_ids)
            ),
            environment=where,
        )
        found = compare(ours, served)
        (drift,) = found.drifts
        assert (drift.unit, drift.kind, drift.bits_recorded) == (unit, "none", unit == "token")
        assert drift.n_shared_completions == drift.a.n_unique == 1
        assert "model.compared" in [change.name for change in found.changes]
    text = next(iter(ours.references.values())).text
    assert drift.n_shared_tokens == len(text) > 8
    assert judge_comparison(found, ["tokens"], 0.95)["tokens"].outcome == "PASS"
    assert judge_comparison(found, ["bits"], 0.95)["bits"].outcome == "INCONCLUSIVE"
    other = measured(
        change=lambda sample: replace(sample, token_texts=("x", *sample.token_texts[1:])),
        environment=where,
    )
    found = compare(ours, other)
    assert found.drifts[0].first_divergence == 0
    verdict = judge_comparison(found, ["tokens"], 0.95)["tokens"]
    assert verdict.reasons == ("tokens: stock p1: another character at 1",)


def test_other_tokens(measured):
    a, b = measured(), measured(change=moved(at=2))
    (drift,) = compare(a, b).drifts
    assert (drift.kind, drift.first_divergence, drift.n_shared_tokens) == ("tokens", 2, 2)
    assert drift.max_abs_dlogprob == pytest.approx(0.25)
    assert drift.k1_kl == pytest.approx(0.125)
    assert drift.n_shared_completions == 0
    assert verdicts(a, b, "tokens", "bits", "unique", "rate") == {
        "tokens": "FAIL",
        "bits": "FAIL",
        "unique": "PASS",
        "rate": "PASS",
    }


def test_other_bits_alone(measured):
    a, b = measured(), measured(change=moved(by=0))
    (drift,) = compare(a, b).drifts
    assert (drift.kind, drift.first_divergence) == ("latent", None)
    assert verdicts(a, b, "tokens", "bits") == {"tokens": "PASS", "bits": "FAIL"}


def test_bits_that_were_not_recorded_prove_nothing(measured):
    def strip(sample):
        return replace(sample, logprobs=(), row_digests=(), margins=())

    found = verdicts(measured(), measured(change=strip), "tokens", "bits")
    assert found == {"tokens": "PASS", "bits": "INCONCLUSIVE"}


def test_how_the_runs_were_made(measured):
    a = measured(environment=Environment(software={"torch": "2.12"}, model={"digest": "a"}))
    b = measured(environment=Environment(software={"torch": "2.13"}, model={"digest": "b"}))
    found = compare(a, b)
    assert [(c.group, c.name, c.a, c.b) for c in found.changes] == [
        ("environment", "software.torch", "2.12", "2.13"),
        ("model", "model.digest", "a", "b"),
    ]
    assert verdicts(a, b, "environment", "model", "kernels", "load") == {
        "environment": "FAIL",
        "model": "FAIL",
        "kernels": "PASS",
        "load": "PASS",
    }


def test_runs_of_one_arm_each_are_compared_across_arms(measured):
    spec = measured().run.spec
    b = measured(spec=replace(spec, arms=("invariant",)))
    found = compare(measured(), b)
    assert [change.name for change in found.changes] == ["spec.arms"]
    assert [(drift.a.arm, drift.b.arm) for drift in found.drifts] == [("stock", "invariant")]


def test_probes_are_matched_by_prompt_not_by_id(measured):
    a = measured()
    b = measured(spec=replace(a.run.spec, probes=(Probe("p1", "another prompt"),)))
    found = compare(a, b)
    assert found.drifts == ()
    assert found.only_in_a == ("stock class Queue:",)
    assert found.only_in_b == ("stock another prompt",)
    assert verdicts(a, b, "tokens", "unique") == {
        "tokens": "INCONCLUSIVE",
        "unique": "INCONCLUSIVE",
    }


def test_a_clean_run_of_fewer_trials_is_no_evidence(measured):
    a = measured("batch-dependent")
    fewer = measured("batch-dependent", spec=replace(a.run.spec, n_samples=10))
    assert verdicts(a, fewer, "unique", "rate") == dict.fromkeys(("unique", "rate"), "INCONCLUSIVE")
    assert verdicts(measured(), fewer, "unique")["unique"] == "FAIL"
