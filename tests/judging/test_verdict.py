"""PASS needs evidence and a control; FAIL needs one divergence; everything else is INCONCLUSIVE."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scipy.stats import binomtest

from ndcheck.analysis.divergence import first_divergence
from ndcheck.analysis.summarising import summarise
from ndcheck.judging.verdict import judge, worst
from ndcheck.plan.faults import plant_fault
from ndcheck.plan.trials import plan_trials
from ndcheck.records import Decoding, Endpoint, Environment, Load, Run, Witness
from ndcheck.request import DEFAULTS
from ndcheck.samplers.scripted.sampler import ScriptedSampler
from ndcheck.selftest import CASES, find_mistake, measure

SPEC = replace(DEFAULTS, arms=("stock",), decoding=Decoding(8), batch_sizes=(1, 3), n_samples=40)


def samples_of(behaviour="clean", spec=SPEC, arm_behaviours=None):
    """What the run would store; ``arm_behaviours`` gives arms different samplers."""
    found = []
    samplers = {a: ScriptedSampler((arm_behaviours or {}).get(a, behaviour)) for a in spec.arms}
    for trial in plan_trials(spec, {"p1": 4}, 1000):
        sampler = samplers[trial.arm]
        if trial.role == "control":
            trial = replace(trial, fault=plant_fault(8))
        found += sampler.sample(trial, spec.probes[0], spec.decoding)
    return found


def judged(samples, spec=SPEC, status="finished"):
    run = Run("r", "0", spec, Environment(), "", status=status)
    return judge(run, summarise(samples, spec))


def test_clean_evidence_passes():
    judgement = judged(samples_of())
    assert judgement.verdict.outcome == "PASS"
    assert "batch-size: 0 of" in " ".join(judgement.verdict.reasons)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda s: replace(s, witness=Witness(None)), "not witnessed"),
        (lambda s: replace(s, error="boom", token_ids=()) if s.slot == 2 else s, "error: "),
    ],
)
def test_clean_results_with_doubts_are_inconclusive(spoil, reason):
    judgement = judged([spoil(s) if s.purpose == "batch-size" else s for s in samples_of()])
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert reason in " ".join(judgement.verdict.reasons)


def test_without_a_control_nothing_passes():
    judgement = judged([s for s in samples_of() if s.role != "control"])
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert "no control ran" in judgement.verdict.reasons[0]


def test_a_control_that_goes_unseen_is_inconclusive():
    reference = samples_of()[0]
    blind = [
        replace(
            s,
            token_ids=reference.token_ids,
            logprobs=reference.logprobs,
            row_digests=reference.row_digests,
        )
        if s.role == "control"
        else s
        for s in samples_of()
    ]
    judgement = judged(blind)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert judgement.verdict.reasons[0] == "the planted fault was caught in 0 of 3 controls"


def test_an_axis_that_was_not_tried_is_inconclusive():
    judgement = judged([s for s in samples_of() if s.purpose != "neighbours"])
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert "neighbours: no trial compared it" in judgement.verdict.reasons


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_an_unfinished_run_does_not_pass(status):
    assert judged(samples_of(), status=status).verdict.outcome == "INCONCLUSIVE"
    assert judged(samples_of("fork"), status=status).verdict.outcome == "FAIL"


@pytest.mark.parametrize("behaviour", ["clean", "fork"])
def test_a_backend_that_changed_does_not_pass_and_is_always_named(behaviour):
    run = Run("r", "0", SPEC, Environment(), "", status="finished", changes=("it changed",))
    judgement = judge(run, summarise(samples_of(behaviour), SPEC))
    assert judgement.verdict.outcome == {"clean": "INCONCLUSIVE", "fork": "FAIL"}[behaviour]
    assert "it changed" in judgement.verdict.reasons


@pytest.mark.parametrize(
    ("arrival", "achieved", "outcome"),
    [
        ("together", 3, "PASS"),
        ("together", 2, "INCONCLUSIVE"),
        ("closed", 2, "INCONCLUSIVE"),
        ("poisson:5", 2, "PASS"),
        ("poisson:5", 1, "INCONCLUSIVE"),
    ],
)
def test_an_open_loop_needs_some_batch_and_other_loads_the_one_asked_for(
    arrival, achieved, outcome
):
    spec = replace(SPEC, endpoint=Endpoint("http://host/v1", arrival=arrival))
    samples = [
        replace(s, witness=Witness(achieved if s.load.batch_size > 1 else 1))
        for s in samples_of(spec=spec)
    ]
    judgement = judged(samples, spec)
    assert judgement.verdict.outcome == outcome
    hint = f"(largest batch seen: {achieved}, asked for: 3)"
    assert (hint in " ".join(judgement.verdict.reasons)) == (outcome != "PASS")


@pytest.mark.parametrize(
    ("behaviour", "axes", "guilty"),
    [
        ("fork", ("slot",), "run-to-run"),
        ("slot-dependent", ("run-to-run", "batch-size"), "slot"),
        ("neighbour-dependent", ("run-to-run", "batch-size", "slot"), None),
        ("batch-dependent", ("run-to-run", "slot"), "batch-size"),
        ("batch-dependent", ("cache",), "batch-size"),
        ("stale", ("neighbours",), "run-to-run"),
    ],
)
def test_what_was_not_asked_for_fails_all_the_same(behaviour, axes, guilty):
    spec = replace(SPEC, axes=axes, batch_sizes=(2, 4), n_samples=60)
    judgement = judged(samples_of(behaviour, spec), spec)
    (probe,) = judgement.probes
    failing = {axis for axis, verdict in probe.axes.items() if verdict.outcome == "FAIL"}
    assert failing == ({guilty} if guilty else set())
    # Fillers of other lengths were never tried, so nothing was seen.
    assert judgement.verdict.outcome == ("FAIL" if guilty else "PASS")


def test_trials_without_a_baseline_fail_too():
    samples = [
        replace(s, baseline=99) for s in samples_of("batch-dependent") if s.role != "control"
    ]
    judgement = judged(samples, replace(SPEC, axes=("slot",)))
    assert judgement.verdict.outcome == "FAIL"


def test_without_a_reference_different_completions_fail():
    samples = [
        replace(s, error="boom", token_ids=()) if s.load == Load(1) else s
        for s in samples_of("batch-dependent")
    ]
    odd = [replace(s, token_ids=(9,) * 8) if s.trial_id == 7 else s for s in samples]
    judgement = judged(odd, replace(SPEC, axes=("neighbours",)))
    assert judgement.verdict.outcome == "FAIL"


@pytest.mark.parametrize("n_odd", [1, 2])
def test_an_odd_reference_is_one_trial_of_run_to_run(n_odd):
    """With the first completion alone as the reference, all others would diverge from it."""
    clean = samples_of()
    odd = [s.sample_id for s in clean if s.load == Load(1) and s.role != "control"][:n_odd]
    samples = [replace(s, token_ids=(9,) * 8) if s.sample_id in odd else s for s in clean]
    (probe,) = summarise(samples, SPEC).probes
    assert (probe.diverged_trials, probe.draw) == (n_odd, "trial")
    (verdict,) = judged(samples).probes
    assert verdict.verdict.outcome == "FAIL"
    assert {a for a, v in verdict.axes.items() if v.outcome == "FAIL"} == {"run-to-run"}


def test_rows_of_one_load_that_ran_again_are_no_new_draws():
    """Two loads exist; one diverges, every time that it runs."""
    spec = replace(SPEC, axes=("cache",), batch_sizes=(1,))
    first = [s for s in samples_of(spec=spec) if s.load.cut is None]
    samples = [
        replace(s, trial_id=s.trial_id + 1000 * n, sample_id=s.sample_id + 1000 * n)
        for n in range(50)
        for s in first
        if n == 0 or s.purpose == "cache"
    ]
    samples = [
        replace(s, token_ids=(9,) * 8) if s.load.cache_state == "prefix" else s for s in samples
    ]
    (probe,) = summarise(samples, spec).probes
    (cache,) = (finding for finding in probe.axes if finding.axis == "cache")
    assert (cache.n_trials, cache.diverged_trials) == (100, 50)
    assert (cache.draw, cache.n_draws, cache.diverged_draws) == ("load", 2, 1)
    interval = binomtest(1, 2).proportion_ci(method="exact")
    assert (cache.rate_ci_low, cache.rate_ci_high) == pytest.approx(tuple(interval))
    assert (probe.n_draws, probe.diverged_draws) == (2, 1)
    (reason,) = judged(samples, spec).verdict.reasons
    assert reason == "cache: tokens diverged in 1 of 2 loads; 1 of them repeated, alike each time"
    # On a server each of them was another batch.
    served = replace(spec, endpoint=Endpoint("http://host/v1"))
    (cache,) = (f for f in summarise(samples, served).probes[0].axes if f.axis == "cache")
    assert (cache.draw, cache.n_draws, cache.diverged_draws) == ("trial", 100, 50)


def test_no_samples_at_all():
    assert judged([]).verdict.outcome == "INCONCLUSIVE"


def test_a_failure_outweighs_doubts():
    samples = [replace(s, witness=Witness(None)) for s in samples_of("batch-dependent")]
    assert judged(samples).verdict.outcome == "FAIL"


def test_latent_divergence_fails_unless_allowed():
    samples = samples_of("latent")
    assert judged(samples).verdict.outcome == "FAIL"
    assert judged(samples, replace(SPEC, allow_latent=True)).verdict.outcome == "PASS"


def test_stock_is_the_invariant_arms_control():
    both = replace(SPEC, arms=("stock", "invariant"))
    fixed = samples_of(spec=both, arm_behaviours={"stock": "batch-dependent"})
    judgement = judged(fixed, both)
    outcomes = {probe.arm: probe.verdict.outcome for probe in judgement.probes}
    assert outcomes == {"stock": "FAIL", "invariant": "PASS"}
    assert judgement.verdict.outcome == "FAIL"
    unproven = judged(samples_of(spec=both), both)
    outcomes = {probe.arm: probe.verdict.outcome for probe in unproven.probes}
    assert outcomes == {"stock": "PASS", "invariant": "INCONCLUSIVE"}
    assert "the stock arm, its control, did not fail" in unproven.verdict.reasons[0]


def test_worst():
    assert worst(["PASS", "INCONCLUSIVE"]) == "INCONCLUSIVE"
    assert worst(["PASS", "FAIL", "INCONCLUSIVE"]) == "FAIL"
    assert worst(["PASS"]) == "PASS"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.behaviour)
def test_selftest_cases_are_judged_rightly(case):
    assert find_mistake(case, measure(ScriptedSampler(case.behaviour))) is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.behaviour)
def test_selftest_cases_can_fail(case):
    """Each case given another behaviour's samples must be seen as wrong."""
    other = "flaky" if case.behaviour == "clean" else "clean"
    assert find_mistake(case, measure(ScriptedSampler(other))) is not None


def test_scripted_behaviours_fork_where_they_say():
    clean, forked = samples_of()[-1], samples_of("fork")[-1]
    assert first_divergence(forked.token_ids, clean.token_ids) == 3
