"""Gate rules: each can pass, fail and stay inconclusive, in the scope it was given for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ndcheck.analysis.summarising import summarise
from ndcheck.errors import UsageError
from ndcheck.judging.comparison import Measured, compare
from ndcheck.judging.rules import Rules, RuleSet, judge_gate
from ndcheck.records import Decoding, Environment, Witness
from ndcheck.request import DEFAULTS

SPEC = replace(
    DEFAULTS,
    decoding=Decoding(8),
    batch_sizes=(1, 3),
    axes=("run-to-run", "batch-size", "slot", "neighbours", "cache"),
    n_samples=40,
    arms=("stock",),
)
BOTH = replace(SPEC, arms=("stock", "invariant"))


def gate(found, rules=None, baseline=None, **limits):
    rules = rules or RuleSet(Rules(**limits))
    comparison = compare(baseline, found) if baseline else None
    return judge_gate(found.run, found.summary, rules, comparison)


def ruling(verdict, rule, axis=None):
    (found,) = (r for r in verdict.rulings if r.rule == rule and r.axis == axis)
    return found.verdict


def test_without_rules_no_trial_may_diverge(measured):
    assert gate(measured()).outcome == "PASS"
    verdict = gate(measured("batch-dependent"))
    assert verdict.outcome == "FAIL"
    assert verdict.reasons[0].startswith("batch-size: tokens diverged in 4 of 4 loads")
    assert verdict.reasons[1].startswith("16 of 22 loads diverged from the probe alone")
    assert gate(measured("latent")).outcome == "FAIL"


@pytest.mark.parametrize(
    ("behaviour", "limits", "outcome"),
    [
        ("batch-dependent", {"max_unique": 1}, "FAIL"),
        ("batch-dependent", {"max_unique": 2}, "PASS"),
        ("batch-dependent", {"max_divergence_rate": 0}, "FAIL"),
        ("batch-dependent", {"max_divergence_rate": 0.3}, "FAIL"),
        ("batch-dependent", {"max_divergence_rate": 0.95}, "PASS"),
        ("batch-dependent", {"max_divergence_rate": 0.7}, "INCONCLUSIVE"),
        ("clean", {"max_divergence_rate": 0.01}, "INCONCLUSIVE"),
        ("clean", {"max_divergence_rate": 0.2}, "PASS"),
        ("clean", {"max_divergence_rate": 0.2, "confidence": 0.9999}, "INCONCLUSIVE"),
        ("batch-dependent", {"min_common_prefix": 3}, "PASS"),
        ("batch-dependent", {"min_common_prefix": 4}, "FAIL"),
        ("clean", {"min_common_prefix": 8}, "PASS"),
        ("latent", {"allow_latent": True}, "PASS"),
        ("latent", {"max_unique": 1}, "FAIL"),
        ("latent", {"max_unique": 2}, "PASS"),
        ("latent", {"max_unique": 2, "allow_latent": False}, "FAIL"),
    ],
)
def test_limits(measured, behaviour, limits, outcome):
    verdict = gate(measured(behaviour), **limits)
    assert verdict.outcome == outcome, verdict.reasons


def test_the_rate_rule_says_what_it_would_take(measured):
    verdict = gate(measured(), max_divergence_rate=0.01)
    assert "368 clean loads to show (target_rate = 0.01)" in verdict.reasons[0]


def test_no_advice_on_a_rate_that_could_not_help(measured):
    """Clean draws are gone once one diverged; target_rate counts trials of all properties."""
    (reason,) = gate(measured("batch-dependent"), max_divergence_rate=0.7).reasons
    assert reason.endswith("at most 70 % accepted")
    rules = RuleSet(by_property={(None, "slot"): Rules(max_divergence_rate=0.1)})
    (reason,) = gate(measured(), rules).reasons
    assert reason.endswith("36 clean loads to show (more samples, or loads)")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: replace(s, witness=Witness(None)), "not witnessed"),
        (lambda s: replace(s, fault=None) if s.role == "control" else s, "caught in 0 of 1"),
        (lambda s: replace(s, error="boom", token_ids=()) if s.slot else s, "error: "),
    ],
)
@pytest.mark.parametrize("limits", [{}, {"max_unique": 3}, {"max_divergence_rate": 0.5}])
def test_no_pass_without_evidence(measured, change, reason, limits):
    verdict = gate(measured(change=change), **limits)
    assert verdict.outcome == "INCONCLUSIVE"
    assert any(reason in text for text in verdict.reasons)


def test_an_unfinished_run_and_an_empty_one_do_not_pass(measured):
    assert gate(measured(status="interrupted")).outcome == "INCONCLUSIVE"
    nothing = measured()
    empty = Measured(nothing.run, summarise([], SPEC), {})
    assert gate(empty, max_unique=1).outcome == "INCONCLUSIVE"


def test_a_backend_that_changed_does_not_pass(measured):
    found = measured()
    changed = replace(found, run=replace(found.run, changes=("it changed",)))
    verdict = gate(changed)
    assert (verdict.outcome, verdict.reasons) == ("INCONCLUSIVE", ("it changed",))


def test_a_property_may_have_rules_of_its_own(measured):
    found = measured("cache-dependent")
    assert gate(found).outcome == "FAIL"
    for limits in ({"min_common_prefix": 3}, {"max_divergence_rate": 0.999}):
        narrow = RuleSet(by_property={(None, "cache"): Rules(**limits, confidence=0.5)})
        verdict = gate(found, narrow)
        assert ruling(verdict, "property", "cache").outcome != "FAIL"
        assert ruling(verdict, "property", "slot").outcome == "PASS"
    elsewhere = RuleSet(by_property={(None, "slot"): Rules(min_common_prefix=3)})
    assert gate(found, elsewhere).outcome == "FAIL"


def test_a_property_may_allow_latent_alone(measured):
    found = measured("latent")
    rules = RuleSet(by_property={(None, "batch-size"): Rules(allow_latent=True)})
    assert gate(found, rules).outcome == "PASS"
    other = RuleSet(by_property={(None, "slot"): Rules(allow_latent=True)})
    assert gate(found, other).outcome == "FAIL"


def test_a_limit_on_the_tokens_of_a_property_says_nothing_of_its_bits(measured):
    for allowed, outcome in ((False, "FAIL"), (True, "PASS")):
        narrow = Rules(min_common_prefix=3, allow_latent=allowed)
        rules = RuleSet(by_property={(None, "batch-size"): narrow})
        assert gate(measured("latent"), rules).outcome == outcome


def test_the_narrower_scope_wins(measured):
    found = measured("batch-dependent")
    assert gate(found, RuleSet(Rules(max_unique=1))).outcome == "FAIL"
    for wide, narrow, outcome in ((1, 2, "PASS"), (2, 1, "FAIL")):
        rules = RuleSet(Rules(max_unique=wide), by_arm={"stock": Rules(max_unique=narrow)})
        assert gate(found, rules).outcome == outcome
    of_both = {(None, "slot"): Rules(confidence=0.8), ("stock", "slot"): Rules(confidence=0.9)}
    assert RuleSet(by_property=of_both).of_property("stock", "slot").confidence == 0.9


def test_stock_may_fail_where_only_the_invariant_arm_is_judged(measured):
    cured = measured(spec=BOTH, arms={"stock": "batch-dependent"})
    assert gate(cured).outcome == "FAIL"
    verdict = gate(cured, RuleSet(arms=("invariant",)))
    assert verdict.outcome == "PASS"
    assert "stock, the other control, failed" in ruling(verdict, "evidence").reasons[0]


def test_stock_that_passes_is_no_control(measured):
    verdict = gate(measured(spec=BOTH), RuleSet(arms=("invariant",)))
    assert verdict.outcome == "INCONCLUSIVE"
    assert "the stock arm, its control, did not fail" in verdict.reasons[0]
    # Latent divergence is no failure where it is allowed, so it is no control either.
    latent = measured(spec=BOTH, arms={"stock": "latent"})
    assert gate(latent, RuleSet(arms=("invariant",))).outcome == "PASS"
    allowed = RuleSet(Rules(allow_latent=True), arms=("invariant",))
    assert gate(latent, allowed).outcome == "INCONCLUSIVE"


def test_slowdown(measured):
    def timed(sample):
        return replace(sample, elapsed_s=3.0 if sample.arm == "invariant" else 2.0)

    found = measured(spec=BOTH, arms={"stock": "batch-dependent"}, change=timed)
    for limit, outcome in ((1.5, "PASS"), (1.4, "FAIL")):
        rules = RuleSet(Rules(max_slowdown=limit), arms=("invariant",))
        assert ruling(gate(found, rules), "max_slowdown").outcome == outcome


@pytest.mark.parametrize(
    ("behaviour", "kinds", "outcome"),
    [
        ("clean", ("tokens", "bits", "unique", "rate"), "PASS"),
        ("batch-dependent", ("unique",), "FAIL"),
        ("batch-dependent", ("rate",), "FAIL"),
        ("batch-dependent", ("tokens", "bits"), "PASS"),
    ],
)
def test_baseline(measured, behaviour, kinds, outcome):
    rules = RuleSet(Rules(max_unique=99), baseline="main", fail_on=kinds)
    verdict = gate(measured(behaviour), rules, baseline=measured())
    assert verdict.outcome == outcome, verdict.reasons


@pytest.mark.parametrize(
    ("rules", "part"),
    [
        (RuleSet(Rules(max_unique=0)), "max_unique: 0"),
        (RuleSet(Rules(max_divergence_rate=1.0)), "max_divergence_rate: 1.0"),
        (RuleSet(Rules(max_divergence_rate=float("nan"))), "max_divergence_rate: nan"),
        (RuleSet(Rules(confidence=0.0)), "confidence: 0.0"),
        (RuleSet(Rules(min_common_prefix=9)), "at most max_tokens, 8"),
        (RuleSet(arms=("invariant",)), "invariant: the run has no such arm"),
        (RuleSet(by_arm={"invariant": Rules()}), "invariant: the run has no such arm"),
        (RuleSet(Rules(max_slowdown=2.0)), "max_slowdown"),
    ],
)
def test_rules_that_could_not_hold_or_fail_are_refused(rules, part):
    with pytest.raises(UsageError, match=part.replace(".", r"\.")):
        rules.check(SPEC)


def test_a_rule_on_a_property_that_is_not_measured_is_refused():
    rules = RuleSet(by_property={(None, "cache"): Rules(allow_latent=True)})
    rules.check(SPEC)
    with pytest.raises(UsageError, match="cache: not measured"):
        rules.check(replace(SPEC, axes=("slot",)))


@pytest.mark.parametrize(
    ("behaviour", "limit", "outcome"),
    [
        ("batch-dependent", 13, "FAIL"),
        ("batch-dependent", 12, "INCONCLUSIVE"),
        ("batch-dependent", 1, "INCONCLUSIVE"),
        ("clean", 13, "PASS"),
    ],
)
@pytest.mark.parametrize("axis", [None, "batch-size"])
def test_common_characters_are_no_common_tokens(measured, behaviour, limit, outcome, axis):
    """A token has a byte at least, and a character of UTF-8 four at most."""
    found = measured(behaviour)
    by_text = Environment(model={"compared": "text"})
    found = replace(found, run=replace(found.run, environment=by_text))
    limits = Rules(min_common_prefix=limit)
    rules = RuleSet(by_property={(None, axis): limits}) if axis else RuleSet(limits)
    verdict = ruling(gate(found, rules), "property" if axis else "min_common_prefix", axis)
    assert verdict.outcome == outcome
    if outcome != "PASS":
        assert "after 3 common characters" in verdict.reasons[0]
