"""The plan: exact sample counts, sound baselines, every asked-for axis, reproducible."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndcheck.errors import UsageError
from ndcheck.plan.confirmations import plan_confirmations
from ndcheck.plan.faults import plant_fault
from ndcheck.plan.fillers import filler_text, fit_to_length
from ndcheck.plan.grid import ALONE, batch_sizes_up_to
from ndcheck.plan.trials import plan_trials
from ndcheck.records import AXES, WIDTHS, Decoding, Endpoint, Fault, Load, Probe
from ndcheck.request import DEFAULTS as RUN_DEFAULTS

DEFAULTS = replace(RUN_DEFAULTS, arms=("stock",))
LENGTHS = {"p1": 9}
CONTEXT = 1000
REPEATS = ("reference", "control", "run-to-run")


def plan(spec=DEFAULTS, n_draws=None, context=CONTEXT):
    return plan_trials(spec, LENGTHS, context, n_draws)


def evidence(trials):
    return [t for t in trials if t.role == "trial"]


def n_counted(trials, axes=AXES):
    """Of the samples asked for: what is fed comes on top, unless nothing else is asked for."""
    all_count = {"width", "scoring"}.issuperset(axes)
    counted = [t for t in trials if t.role != "control" and (all_count or not t.load.is_fed)]
    return sum(t.n_samples for t in counted)


def other_loads(trials):
    return {t.load for t in trials} - {ALONE}


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
            of_control = {"width", "scoring"} if trial.role == "control" else set()
            assert baseline.purpose in {"reference", "batch-size", *of_control}
        else:
            assert (trial.purpose, trial.load) == ("reference", ALONE)
        if trial.role == "control":
            # Of the reference, and of what is fed alone: the same load without the fault.
            assert trial.load == trials[trial.baseline].load
        if trial.role == "trial":
            # Baselines, and repeats of them, are evidence whatever was asked for.
            assert trial.purpose in {*axes, "batch-size", "run-to-run"}
    assert len({t.load for t in trials if t.purpose not in REPEATS}) == len(
        [t for t in trials if t.arm == arms[0] and t.purpose not in REPEATS]
    )
    for arm in arms:
        mine = [t for t in trials if t.arm == arm]
        counted = n_counted(mine, axes)
        is_endless = "run-to-run" in axes or max(batch_sizes) > 1
        assert counted == n_samples or (counted < n_samples and not is_endless)
        fed = {t.purpose for t in mine if t.load.is_fed and t.load.batch_size == 1} & set(AXES)
        controls = [t.load for t in mine if t.role == "control"]
        assert controls[0] == ALONE
        of_fed = sorted(load.scores for load in controls[1:])
        assert of_fed == sorted(axis == "scoring" for axis in fed)
        assert n_samples == 1 or (mine[-1].purpose, mine[-1].load) == ("run-to-run", ALONE)


def test_baselines_differ_along_their_axis_only():
    trials = plan(replace(DEFAULTS, n_samples=400))
    assert {t.purpose for t in trials} == {"reference", "control", *AXES}
    for trial in evidence(trials):
        load, base = trial.load, trials[trial.baseline].load
        if trial.purpose == "run-to-run":
            assert load == base
        elif trial.purpose == "batch-size":
            assert base.batch_size == 1
            assert set(load.filler_lengths) <= {LENGTHS["p1"]}
            assert load.cache_state == "whole"
        elif trial.purpose == "slot":
            assert replace(load, slots=base.slots) == base
            assert load.slots != base.slots
        elif trial.purpose == "neighbours":
            assert (load.batch_size, load.slots) == (base.batch_size, base.slots)
            assert (load.filler_lengths, load.filler_seed) != (
                base.filler_lengths,
                base.filler_seed,
            )
        elif trial.purpose == "width":
            assert load.width > 1
            assert load.decoded == replace(load, width=1) == base
        elif trial.purpose == "scoring":
            assert load.scores
            assert load.decoded == base
            assert load.cache_state in ("whole", "chunked")
        else:
            assert trial.purpose == "cache"
            assert load.cache_state != base.cache_state == "whole"
            assert replace(load, cache_state="whole", cut=None) == base


def test_every_batch_size_meets_every_axis_within_the_default_run():
    trials = evidence(plan())
    assert {t.load.width for t in trials if t.load == Load(1, width=t.load.width)} == {1, *WIDTHS}
    seen = {(t.purpose, t.load.batch_size) for t in trials}
    for batch_size in DEFAULTS.batch_sizes[1:]:
        for axis in AXES:
            assert (axis, batch_size) in seen


def test_neighbours_are_shorter_longer_and_ragged():
    trials = plan(replace(DEFAULTS, n_samples=300))
    lengths = [t.load.filler_lengths for t in trials if t.purpose == "neighbours"]
    assert any(max(x) < 9 for x in lengths)
    assert any(min(x) > 9 for x in lengths)
    assert any(min(x) < 9 < max(x) for x in lengths)


@pytest.mark.parametrize("mode", ["copies", "mixed"])
@pytest.mark.parametrize("axes", [AXES, ("slot",), ("batch-size",), ("cache",)])
def test_every_size_follows_a_larger_and_a_smaller_one(mode, axes):
    sizes = [t.load.batch_size for t in plan(replace(DEFAULTS, mode=mode, axes=axes))]
    for size in DEFAULTS.batch_sizes:
        places = [i for i, other in enumerate(sizes) if other == size]
        assert any(max(sizes[:i], default=0) > size for i in places) or size == max(sizes)
        assert any(sizes[i - 1] > size for i in places) or size == max(sizes)
        assert any(i > 0 and sizes[i - 1] < size for i in places) or size == 1
    assert sizes[-1] == 1


def test_in_process_a_load_that_is_no_repeat_runs_once():
    trials = plan(replace(DEFAULTS, n_samples=1000))
    loads = [t.load for t in trials if t.purpose not in REPEATS]
    assert len(loads) == len(set(loads)) > 300
    # What repeats is a load that ran before, in the same arm.
    ran = {t.load for t in trials if t.purpose not in REPEATS} | {ALONE}
    assert {t.load for t in trials if t.purpose == "run-to-run"} <= ran


def test_baselines_are_repeated_whatever_is_asked_for():
    for axes in (("slot",), ("neighbours",), ("cache",), ("batch-size",)):
        trials = plan(replace(DEFAULTS, axes=axes, n_samples=100))
        baselines = {trials[t.baseline].load for t in evidence(trials) if t.purpose in axes}
        repeated = {t.load for t in trials if t.purpose == "run-to-run"}
        assert ALONE in repeated
        assert sum(load in repeated for load in baselines) > 0.7 * len(baselines)


def test_an_exhausted_grid_ends_the_plan():
    spec = replace(DEFAULTS, batch_sizes=(1,), axes=("cache",), n_samples=1000)
    trials = plan(spec)
    # Nine tokens: chunks of 1 to 8, and 1 to 8 tokens after a prefix.
    cuts = {
        state: [t.load.cut for t in trials if t.load.cache_state == state]
        for state in ("chunked", "prefix")
    }
    assert cuts["chunked"][0] is cuts["prefix"][0] is None  # 3 and 4 tokens, by itself
    assert sorted(cuts["chunked"][1:]) == [1, 2, 4, 5, 6, 7, 8]
    assert sorted(cuts["prefix"][1:]) == [1, 2, 3, 5, 6, 7, 8]
    assert [t.load for t in trials if t.load not in other_loads(trials)] == [ALONE] * 5
    # A server's batch is formed anew: there the same is asked as often as wanted.
    served = plan(replace(spec, endpoint=Endpoint("http://host/v1")))
    assert sum(t.n_samples for t in served if t.role != "control") == 1000


def test_the_probe_alone_comes_first_in_the_round_and_last():
    spec = replace(DEFAULTS, endpoint=Endpoint("http://host/v1"), n_samples=50)
    trials = plan(spec)
    first, last = trials[0], trials[-1]
    assert (first.purpose, first.load) == ("reference", Load(1))
    assert (last.purpose, last.load, last.baseline) == ("run-to-run", Load(1), first.trial_id)
    assert n_counted(trials) == 50


def test_only_cache_states_that_the_backend_has_are_planned():
    for states in ((), ("prefix",)):
        trials = plan_trials(DEFAULTS, {"p1": 4}, CONTEXT, cache_states=states)
        assert {t.load.cache_state for t in trials if t.purpose == "cache"} == set(states)


def test_plan_is_reproducible_and_follows_the_seed():
    assert plan() == plan()
    assert plan() != plan(replace(DEFAULTS, seed=1))


def test_target_rate_counts_distinct_loads():
    assert len(other_loads(plan(n_draws=368))) == 368
    served = plan(replace(DEFAULTS, endpoint=Endpoint("http://host/v1")), n_draws=368)
    assert 368 <= len(evidence(served)) <= 369  # and the probe alone, last
    repeats = plan(replace(DEFAULTS, axes=("run-to-run",)), n_draws=368)
    assert 368 <= len(evidence(repeats)) <= 369
    # No more loads than there are, and an end.
    few = replace(DEFAULTS, batch_sizes=(1,), axes=("run-to-run", "cache"))
    assert len(other_loads(plan(few, n_draws=368))) == 16


def test_arms_are_interleaved_on_the_same_loads():
    trials = plan(replace(DEFAULTS, arms=("stock", "invariant")))
    for stock, invariant in zip(trials[::2], trials[1::2], strict=True):
        assert (stock.arm, invariant.arm) == ("stock", "invariant")
        assert (stock.purpose, stock.load) == (invariant.purpose, invariant.load)


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
        assert n_counted(mine) == 50


@given(st.integers(0, 2**32), st.integers(1, 200))
def test_filler_text_is_a_function_of_its_seed(seed, n_words):
    text = filler_text(seed, n_words)
    assert text == filler_text(seed, n_words)
    assert len(text.split()) == n_words


def test_fit_to_length():
    assert fit_to_length([1, 2, 3], 2) == [1, 2]
    assert fit_to_length([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]


def test_planted_fault_lies_within_the_completion():
    assert plant_fault(0) is None
    assert plant_fault(1) == Fault(0, 0)
    for n in range(2, 100):
        fault = plant_fault(n)
        assert 0 <= fault.latent_at < fault.fork_at < n


def test_batch_sizes_up_to_the_largest():
    assert batch_sizes_up_to(1) == (1,)
    assert batch_sizes_up_to(8) == (1, 2, 4, 8)
    assert batch_sizes_up_to(9) == (1, 2, 4, 8, 9)


def test_under_continuous_batching_copies_meet_other_company_in_each_round():
    spec = replace(DEFAULTS, batch_sizes=(4,), axes=("batch-size",), n_samples=23)
    exact, continuous = plan(spec), plan(replace(spec, batching="continuous"))
    # In an exact batch four copies are one load: then fillers take the place of some.
    assert sum(t.load.slots == (0, 1, 2, 3) for t in exact if t.purpose == "batch-size") == 1
    seeds = [t.load.filler_seed for t in continuous if t.purpose == "batch-size"]
    assert len(set(seeds)) == len(seeds) >= 3


def test_what_diverged_once_is_confirmed():
    trials = [t for t in plan(replace(DEFAULTS, n_samples=150)) if t.role != "control"]
    same = {t.trial_id: dict.fromkeys(t.load.slots, (1, 1)) for t in trials}

    def confirmed(*odd, row=(2, 2)):
        changed = {t.trial_id: dict.fromkeys(t.load.slots, row) for t in odd}
        return plan_confirmations(trials, {**same, **changed})

    of = {axis: [t for t in trials if t.purpose == axis] for axis in AXES}
    assert confirmed() == []
    # Each once more, two of an axis at the most, with ids and samples that follow the run's.
    again = confirmed(*of["neighbours"], of["slot"][0])
    once_more = sorted(t.trial_id for t in (of["slot"][0], *of["neighbours"][:2]))
    assert [(t.purpose, t.baseline) for t in again] == [("run-to-run", i) for i in once_more]
    assert [t.trial_id for t in again] == list(range(len(trials), len(trials) + 3))
    assert again[0].first_sample_id == trials[-1].first_sample_id + 1
    # Baselines are repeated by plan. Bits count where no token parted.
    repeated = {t.load for t in of["run-to-run"]}
    assert all(t.load not in repeated for t in confirmed(*of["batch-size"]))
    assert [t.load for t in confirmed(of["slot"][0], row=(1, 2))] == [of["slot"][0].load]


def test_a_prompt_shorter_than_a_page_shares_no_prefix():
    spec = replace(DEFAULTS, batching="continuous", axes=("cache",), batch_sizes=(1, 3))
    states = {
        length: {t.load.cache_state for t in plan_trials(spec, {"p1": length}, CONTEXT)}
        for length in (4, 5)
    }
    assert states == {4: {"whole", "chunked"}, 5: {"whole", "chunked", "prefix"}}
