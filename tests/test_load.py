"""The plan: exact sample counts, sound baselines, every asked-for axis, reproducible."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndcheck.errors import UsageError
from ndcheck.load import batch_sizes_up_to, filler_text, fit_to_length, plan_trials, plant_fault
from ndcheck.records import AXES, Decoding, Endpoint, Load, Probe
from ndcheck.request import DEFAULTS as RUN_DEFAULTS

DEFAULTS = replace(RUN_DEFAULTS, arms=("stock",))
LENGTHS = {"p1": 9}
CONTEXT = 1000


def plan(spec=DEFAULTS, n_trials=None, context=CONTEXT):
    return plan_trials(spec, LENGTHS, context, n_trials)


def evidence(trials):
    return [t for t in trials if t.axis not in ("reference", "control")]


@given(
    n_samples=st.integers(1, 400),
    batch_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True),
    axes=st.lists(st.sampled_from(AXES), min_size=1, unique=True),
    mode=st.sampled_from(["copies", "mixed"]),
    arms=st.sampled_from([("stock",), ("stock", "invariant")]),
)
@settings(deadline=None, max_examples=60)
def test_plan_invariants(n_samples, batch_sizes, axes, mode, arms):
    spec = replace(
        DEFAULTS,
        n_samples=n_samples,
        batch_sizes=tuple(batch_sizes),
        axes=tuple(axes),
        mode=mode,
        arms=arms,
    )
    trials = plan(spec)
    assert [t.trial_id for t in trials] == list(range(len(trials)))
    next_sample = 0
    for trial in trials:
        load = trial.load
        assert trial.first_sample_id == next_sample
        next_sample += trial.n_samples
        assert len(load.slots) + len(load.filler_lengths) == load.batch_size
        assert all(0 <= slot < load.batch_size for slot in load.slots)
        assert all(1 <= n <= CONTEXT - spec.decoding.max_tokens for n in load.filler_lengths)
        if trial.baseline is not None:
            baseline = trials[trial.baseline]
            assert baseline.trial_id < trial.trial_id
            assert (baseline.arm, baseline.probe_id) == (trial.arm, trial.probe_id)
            assert baseline.axis in ("reference", "batch-size")
        if trial.axis not in ("reference", "control"):
            assert trial.axis in axes
    can_vary = max(batch_sizes) > 1 or {"run-to-run", "cache"} & set(axes)
    for arm in arms:
        counted = sum(t.n_samples for t in trials if t.arm == arm and t.axis != "control")
        assert counted == (n_samples if can_vary else 1)
        assert sum(t.axis == "control" for t in trials if t.arm == arm) == 1


def test_baselines_differ_along_their_axis_only():
    trials = plan(replace(DEFAULTS, n_samples=400))
    assert {t.axis for t in trials} == {"reference", "control", *AXES}
    for trial in evidence(trials):
        load, base = trial.load, trials[trial.baseline].load
        if trial.axis == "run-to-run":
            assert load == base
        elif trial.axis == "batch-size":
            assert base.batch_size == 1
            assert set(load.filler_lengths) <= {LENGTHS["p1"]}
            assert load.cache_state == "whole"
        elif trial.axis == "slot":
            assert replace(load, slots=base.slots) == base
            assert load.slots != base.slots
        elif trial.axis == "neighbours":
            assert (load.batch_size, load.slots) == (base.batch_size, base.slots)
            assert (load.filler_lengths, load.filler_seed) != (
                base.filler_lengths,
                base.filler_seed,
            )
        else:
            assert trial.axis == "cache"
            trimmed = base.slots[: len(load.slots)]
            assert load.slots == trimmed
            assert load.cache_state != base.cache_state == "whole"


def test_every_batch_size_meets_every_axis_within_the_default_run():
    seen = {(t.axis, t.load.batch_size) for t in evidence(plan())}
    for batch_size in DEFAULTS.batch_sizes[1:]:
        for axis in AXES:
            assert (axis, batch_size) in seen


def test_neighbours_are_shorter_longer_and_ragged():
    lengths = [t.load.filler_lengths for t in plan() if t.axis == "neighbours"]
    assert any(max(x) < 9 for x in lengths)
    assert any(min(x) > 9 for x in lengths)
    assert any(min(x) < 9 < max(x) for x in lengths)


def test_a_server_is_asked_alone_before_and_after():
    spec = replace(DEFAULTS, endpoint=Endpoint("http://host/v1"), n_samples=50)
    trials = plan(spec)
    first, last = trials[0], trials[-1]
    assert (first.axis, first.load) == ("reference", Load(1))
    assert (last.axis, last.load, last.baseline) == ("run-to-run", Load(1), first.trial_id)
    assert sum(t.n_samples for t in trials if t.axis != "control") == 50


def test_only_cache_states_that_the_backend_has_are_planned():
    for states in ((), ("prefix",)):
        trials = plan_trials(DEFAULTS, {"p1": 4}, CONTEXT, cache_states=states)
        assert {t.load.cache_state for t in trials if t.axis == "cache"} == set(states)


def test_plan_is_reproducible_and_follows_the_seed():
    assert plan() == plan()
    assert plan() != plan(replace(DEFAULTS, seed=1))


def test_target_rate_counts_trials():
    trials = plan(n_trials=299)
    assert len(evidence(trials)) == 299


def test_arms_are_interleaved_on_the_same_loads():
    trials = plan(replace(DEFAULTS, arms=("stock", "invariant")))
    for stock, invariant in zip(trials[::2], trials[1::2], strict=True):
        assert (stock.arm, invariant.arm) == ("stock", "invariant")
        assert (stock.axis, stock.load) == (invariant.axis, invariant.load)


def test_mixed_mode_has_one_probe_row_a_batch():
    trials = plan(replace(DEFAULTS, mode="mixed", n_samples=60))
    assert all(t.n_samples == 1 for t in trials)


def test_prompt_beyond_the_context_is_refused():
    with pytest.raises(UsageError, match=r"9 tokens.*--max-tokens 100.*context of 105"):
        plan(context=105)


def test_probes_each_get_their_samples():
    probes = (Probe("a", "x"), Probe("b", "y"))
    spec = replace(DEFAULTS, probes=probes, n_samples=50, decoding=Decoding(4))
    trials = plan_trials(spec, {"a": 3, "b": 7}, CONTEXT)
    for probe in probes:
        mine = [t for t in trials if t.probe_id == probe.probe_id]
        assert sum(t.n_samples for t in mine if t.axis != "control") == 50


@given(st.integers(0, 2**32), st.integers(1, 200))
def test_filler_text_is_a_function_of_its_seed(seed, n_words):
    text = filler_text(seed, n_words)
    assert text == filler_text(seed, n_words)
    assert len(text.split()) == n_words


def test_fit_to_length():
    assert fit_to_length([1, 2, 3], 2) == [1, 2]
    assert fit_to_length([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]


def test_planted_fault_lies_within_the_completion():
    assert plant_fault(1) is None
    for n in range(2, 100):
        fault = plant_fault(n)
        assert 0 <= fault.latent_at < fault.fork_at < n


def test_batch_sizes_up_to_the_largest():
    assert batch_sizes_up_to(1) == (1,)
    assert batch_sizes_up_to(8) == (1, 2, 4, 8)
    assert batch_sizes_up_to(9) == (1, 2, 4, 8, 9)


def test_under_continuous_batching_copies_meet_other_company_in_each_round():
    spec = replace(DEFAULTS, batch_sizes=(4,), axes=("batch-size",), n_samples=13)
    exact, continuous = plan(spec), plan(replace(spec, batching="continuous"))
    assert len({t.load for t in evidence(exact)}) == 1
    assert len({t.load.filler_seed for t in evidence(continuous)}) == 3


def test_a_prompt_shorter_than_a_page_shares_no_prefix():
    spec = replace(DEFAULTS, batching="continuous", axes=("cache",), batch_sizes=(1, 3))
    states = {
        length: {t.load.cache_state for t in plan_trials(spec, {"p1": length}, CONTEXT)}
        for length in (4, 5)
    }
    assert states == {4: {"whole", "chunked"}, 5: {"whole", "chunked", "prefix"}}
