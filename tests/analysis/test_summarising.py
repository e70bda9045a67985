"""Every field of the summary, on examples small enough to compute by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.analysis.statistics import clopper_pearson
from ndcheck.analysis.summarising import summarise
from ndcheck.analysis.trials import sum_parts
from ndcheck.records import AXES, Load, Probe

# What is counted


def test_an_empty_stream_has_a_summary_for_each_probe_and_arm(build):
    spec = replace(
        build.spec,
        probes=(Probe("p1", "one"), Probe("p2", "two")),
        arms=("stock", "invariant"),
        axes=("slot", "cache"),
    )
    summary = summarise([], spec)
    assert [(p.probe_id, p.arm) for p in summary.probes] == [
        ("p1", "stock"),
        ("p1", "invariant"),
        ("p2", "stock"),
        ("p2", "invariant"),
    ]
    probe = summary.probes[0]
    assert (probe.n_trials, probe.n_samples, probe.n_errors, probe.n_unique) == (0, 0, 0, 0)
    assert (probe.modal_count, probe.common_prefix_tokens, probe.elapsed_s) == (0, 0, 0)
    assert probe.divergence_rate is probe.rate_ci_low is probe.rate_ci_high is None
    assert probe.unseen_mass is probe.chao1 is probe.tokens_per_s is probe.tree is None
    assert probe.slowdown_vs_stock is summary.fisher_p is None
    assert (len(probe.completions), probe.loads) == (0, ())
    assert [finding.axis for finding in probe.axes] == ["slot", "cache"]
    assert all(f.n_trials == 0 and f.rate is f.rate_ci_high is None for f in probe.axes)
    assert len(summary.samples.completion_id) == 0


def test_probes_and_arms_are_kept_apart(build):
    samples = [
        build.reference("ab"),
        build.reference("ax", trial_id=1, arm="invariant"),
        build.sample(2, "ay"),
        build.sample(3, "ax", arm="invariant", baseline=1),
        build.reference("q", trial_id=4, probe_id="p2"),
    ]
    spec = replace(build.spec, arms=("stock", "invariant"))
    summary = summarise(samples, spec)
    assert [(p.probe_id, p.arm, p.n_samples, p.n_unique) for p in summary.probes] == [
        ("p1", "stock", 2, 2),
        ("p1", "invariant", 2, 1),
        ("p2", "stock", 1, 1),
    ]
    assert summary.samples.completion_id.tolist() == [1, 1, 2, 1, 1]


def test_counts_of_trials_samples_and_completions(build):
    samples = [
        build.reference("abc"),
        *build.copies(1, ["abc", "abd", "abd"]),
        *build.copies(2, ["abc", "abc", "abc"]),
        build.sample(3, "axy"),
        build.error(4),
    ]
    probe = build.probe(samples)
    assert (probe.n_trials, probe.diverged_trials, probe.latent_trials) == (3, 2, 0)
    assert (probe.n_samples, probe.n_errors, probe.n_unique, probe.modal_count) == (8, 1, 3, 5)
    assert probe.common_prefix_tokens == 1
    assert probe.divergence_rate == pytest.approx(2 / 3)
    assert (probe.rate_ci_low, probe.rate_ci_high) == clopper_pearson(2, 3, 0.95)
    assert probe.confidence == 0.95
    reference, forked, other = probe.completions
    assert [(c.text, c.count, c.n_trials) for c in probe.completions] == [
        ("abc", 5, 3),
        ("abd", 2, 1),
        ("axy", 1, 1),
    ]
    assert (reference.first_divergence, reference.margin) == (None, None)
    assert reference.divergent_token is reference.reference_token is None
    assert (forked.first_divergence, forked.divergent_token, forked.reference_token) == (
        2,
        "d",
        "c",
    )
    assert (other.first_divergence, other.share) == (1, 1 / 8)


def test_no_divergence_is_bounded_from_above_only(build):
    samples = [build.reference("ab"), build.sample(1, "ab"), build.sample(2, "ab", slot=1)]
    probe = build.probe(samples)
    assert (probe.divergence_rate, probe.rate_ci_low) == (0, 0)
    assert probe.rate_ci_high == pytest.approx(1 - 0.025**0.5)
    assert probe.unseen_mass is probe.chao1 is probe.tree is None
    assert probe.common_prefix_tokens == 2


def test_prefix_completions_diverge_where_one_ends(build):
    samples = [
        build.reference("ab", margins=(3.0, 2.0)),
        build.sample(1, "abc", finish_reason="stop"),
        build.sample(2, "a"),
    ]
    summary = summarise(samples, build.spec)
    longer, shorter = summary.probes[0].completions[1:]
    assert (longer.first_divergence, longer.divergent_token, longer.reference_token) == (2, "c", "")
    assert (longer.margin, longer.finish_reason) == (None, "stop")
    assert (shorter.first_divergence, shorter.divergent_token) == (1, "")
    assert (shorter.reference_token, shorter.margin) == ("b", 2.0)
    assert summary.samples.first_divergence.tolist() == [-1, 2, 1]


def test_a_baseline_that_was_not_asked_for_is_evidence_all_the_same(build):
    samples = [
        build.reference("ab"),
        build.sample(1, "ax", purpose="reference"),
        build.sample(2, "ax", purpose="cache", baseline=1),
    ]
    probe = build.probe(samples)
    assert (probe.n_trials, probe.diverged_trials, probe.n_samples) == (2, 2, 3)
    assert probe.completions[0].first_divergence == 1
    assert build.finding(probe, "cache").diverged_trials == 0
    assert build.finding(probe, "batch-size").diverged_trials == 1


def test_a_batch_that_serves_as_a_baseline_is_never_the_reference(build):
    samples = [build.sample(1, "ax", purpose="reference"), build.reference("ab")]
    diverged = {c.text: c.first_divergence for c in build.probe(samples).completions}
    assert diverged == {"ab": None, "ax": 1}


def test_unseen_completions_count_trials_not_rows(build):
    # Seen in one trial: abd (two rows) and axy; in two trials: abe.
    samples = [
        build.reference("abc"),
        *build.copies(1, ["abc", "abd", "abd", "axy"]),
        build.sample(2, "abe"),
        build.sample(3, "abe"),
    ]
    probe = build.probe(samples)
    assert probe.unseen_mass == 1 / 4  # one of four trials, the reference's included, was novel
    # 4 + 3/4 * 2 * 1 / (2 * (f2 + 1)); abc and abe were seen in two trials
    assert probe.chao1 == pytest.approx(4 + 3 / 4 * 2 / 6)


# Errors and missing trials


def test_errors_count_as_errors_only(build):
    samples = [
        build.reference("ab"),
        build.sample(1, "ab"),
        build.error(2, elapsed_s=9.0),
        build.error(3, load=Load(64, (0, 1)), elapsed_s=9.0),
        build.error(3, load=Load(64, (0, 1)), slot=1, elapsed_s=9.0),
    ]
    summary = summarise(samples, build.spec)
    (probe,) = summary.probes
    assert (probe.n_trials, probe.n_samples, probe.n_errors, probe.n_unique) == (1, 2, 3, 1)
    assert probe.first_error == samples[2].error
    assert (probe.elapsed_s, probe.unwitnessed_trials) == (2, 0)
    assert build.finding(probe, "batch-size").n_trials == 1
    assert build.load(probe, "batch-size", 2).n_errors == 1
    failed = build.load(probe, "batch-size", 64, slot=None)
    assert (failed.n_trials, failed.n_samples, failed.n_errors, failed.n_unique) == (0, 0, 2, 0)
    assert failed.tokens_per_s is failed.achieved_batch_size_min is None
    assert summary.samples.completion_id.tolist() == [1, 1, -1, -1, -1]
    assert np.isnan(summary.samples.max_abs_dlogprob[2:]).all()


def test_a_trial_counts_if_any_of_its_rows_did_not_fail(build):
    load = Load(2, (0, 1))
    samples = [
        build.reference("ab"),
        build.error(1, load=load),
        build.sample(1, "ax", slot=1, load=load),
    ]
    probe = build.probe(samples)
    assert (probe.n_trials, probe.diverged_trials, probe.n_errors) == (1, 1, 1)


@pytest.mark.parametrize("baseline", [None, 9])
def test_a_trial_without_its_baseline_is_not_counted_for_its_axis(build, baseline):
    samples = [build.reference("ab"), build.sample(1, "ax", purpose="cache", baseline=baseline)]
    probe = build.probe(samples)
    assert build.finding(probe, "cache").n_trials == 0
    assert (probe.n_trials, probe.diverged_trials) == (1, 1)


def test_a_trial_whose_baseline_failed_is_not_counted_for_its_axis(build):
    samples = [
        build.reference("ab"),
        build.error(1),
        build.sample(2, "ax", purpose="neighbours", baseline=1),
    ]
    assert build.finding(build.probe(samples), "neighbours").n_trials == 0


@pytest.mark.parametrize("failed", [True, False])
def test_without_a_reference_nothing_is_compared_with_it(build, failed):
    samples = [
        *([build.error(0, purpose="reference", baseline=None)] if failed else []),
        build.sample(1, "ab"),
        build.sample(2, "ax", purpose="run-to-run", baseline=1),
    ]
    summary = summarise(samples, build.spec)
    (probe,) = summary.probes
    assert (probe.n_trials, probe.diverged_trials, probe.divergence_rate) == (0, 0, None)
    assert (probe.n_samples, probe.n_unique) == (2, 2)
    assert all(c.first_divergence is None for c in probe.completions)
    assert probe.metrics.k1_kl is probe.metrics.flip_rate_per_step is None
    assert build.finding(probe, "batch-size").n_trials == 0
    assert build.finding(probe, "run-to-run").diverged_trials == 1
    assert set(summary.samples.first_divergence.tolist()) == {-1}


# Two arms


def test_arms_are_compared_by_trials_and_by_time_on_the_same_loads(build):
    spec = replace(build.spec, arms=("stock", "invariant"))
    samples = [
        build.reference("ab", elapsed_s=1.0),
        build.reference("ab", trial_id=1, arm="invariant", elapsed_s=1.5),
    ]
    for trial_id in range(2, 10):
        arm = "invariant" if trial_id % 2 else "stock"
        samples.append(
            build.sample(
                trial_id,
                "ab" if arm == "invariant" else "ax",
                arm=arm,
                baseline=int(arm == "invariant"),
                batch_size=2 + (trial_id - 2) // 4,
                elapsed_s=3.0 if arm == "invariant" else 1.0,
            )
        )
    samples.append(build.sample(99, "ab", arm="invariant", baseline=1, batch_size=77))
    summary = summarise(samples, spec)
    stock, invariant = summary.probes
    assert (stock.diverged_trials, stock.n_trials) == (4, 4)
    assert (invariant.diverged_trials, invariant.n_trials) == (0, 5)
    # Two loads of stock's, both diverged, and three of the other's: one table of C(5, 2).
    assert (stock.diverged_draws, stock.n_draws) == (2, 2)
    assert (invariant.diverged_draws, invariant.n_draws) == (0, 3)
    assert summary.fisher_p == pytest.approx(1 / math.comb(5, 2))
    assert stock.slowdown_vs_stock is None
    assert invariant.slowdown_vs_stock == 3.0  # of 1.5, 3 and 3; batch size 77 ran once only


def test_one_arm_is_not_compared(build):
    summary = summarise([build.reference("ab"), build.sample(1, "ax")], build.spec)
    assert summary.fisher_p is None


# Order

RUNS = st.lists(
    st.lists(st.tuples(st.text("ab", max_size=3), st.sampled_from([(), (0,), (1,)])), min_size=1),
    max_size=5,
)


def samples_of(build, trials):
    samples = [build.reference("aba")]
    for trial_id, rows in enumerate(trials, 1):
        load = Load(len(rows), tuple(range(len(rows))))
        samples += [
            build.sample(
                trial_id,
                text,
                slot=slot,
                load=load,
                moved=moved,
                purpose=AXES[trial_id % len(AXES)],
                baseline=trial_id - 1,
            )
            for slot, (text, moved) in enumerate(rows)
        ]
    return samples


@given(RUNS, st.randoms())
def test_the_order_of_the_stream_does_not_matter(build, trials, random):
    samples = samples_of(build, trials)
    order = list(range(len(samples)))
    random.shuffle(order)
    straight = summarise(samples, build.spec)
    shuffled = summarise([samples[i] for i in order], build.spec)

    def essence(summary):
        (probe,) = summary.probes
        completions = {(c.text, c.count, c.n_trials, c.first_divergence) for c in probe.completions}
        fields = ("n_trials", "n_samples", "diverged_trials", "latent_trials", "unseen_mass")
        counts = [getattr(probe, field) for field in fields]
        return completions, counts, probe.axes, probe.loads, probe.common_prefix_tokens

    assert essence(shuffled) == essence(straight)
    for column in ("first_divergence", "latent_divergence", "max_abs_dlogprob", "margin"):
        np.testing.assert_array_equal(
            getattr(shuffled.samples, column), getattr(straight.samples, column)[order]
        )


@given(RUNS)
def test_outcomes_equal_brute_force(build, trials):
    samples = [build.reference("aba")]
    for trial_id, rows in enumerate(trials, 1):
        samples += [
            build.sample(trial_id, text, slot=slot, moved=moved)
            for slot, (text, moved) in enumerate(rows)
        ]
    summary = summarise(samples, build.spec)
    (probe,) = summary.probes
    texts = [sample.text for sample in samples]
    assert [probe.completions[i - 1].text for i in summary.samples.completion_id] == texts
    diverged = [any(text != "aba" for text, _ in rows) for rows in trials]
    moved = [any(moved for _, moved in rows) for rows in trials]
    assert probe.diverged_trials == sum(diverged)
    assert probe.latent_trials == sum(m and not d for m, d in zip(moved, diverged, strict=True))
    assert probe.n_samples == sum(c.count for c in probe.completions) == len(samples)


@given(st.lists(RUNS, min_size=1, max_size=4))
def test_a_probe_among_others_is_summarised_as_by_itself(build, runs):
    """Groups are found all at once: none may show in another."""
    of_probe = {
        f"p{i}": [replace(sample, probe_id=f"p{i}") for sample in samples_of(build, trials)]
        for i, trials in enumerate(runs)
    }
    samples = [sample for own in of_probe.values() for sample in own]
    spec = replace(build.spec, probes=tuple(Probe(name, "x") for name in of_probe))
    together = {(p.arm, p.probe_id): p for p in summarise(samples, spec).probes}
    for name, own in of_probe.items():
        alone = summarise(own, replace(spec, probes=(Probe(name, "x"),)))
        for probe in alone.probes:
            other = together[probe.arm, name]
            assert list(map(str, other.completions)) == list(map(str, probe.completions))
            assert other.metrics == probe.metrics
            assert replace(other, completions=(), find_tree=None, measure=None) == replace(
                probe, completions=(), find_tree=None, measure=None
            )


@given(st.lists(st.lists(st.floats(0, 1e6), max_size=40), min_size=1, max_size=8))
def test_parts_are_summed_as_numpy_sums_them_alone(parts):
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    values = np.array([value for part in parts for value in part])
    assert sum_parts(values, numbers, len(parts)) == [float(np.sum(part)) for part in parts]
