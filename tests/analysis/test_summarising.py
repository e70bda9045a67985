"""Every field of the summary, on examples small enough to compute by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.analysis.statistics import clopper_pearson
from ndcheck.analysis.summarising import summarise
from ndcheck.records import AXES, Fault, Load, Probe

ULP = 2.0**-24


def finding_of(probe, axis):
    return next(finding for finding in probe.axes if finding.axis == axis)


def load_of(probe, axis, batch_size, slot=0):
    found = [
        load
        for load in probe.loads
        if (load.axis, load.batch_size, load.slot) == (axis, batch_size, slot)
    ]
    (load,) = found
    return load


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
    assert finding_of(probe, "cache").diverged_trials == 0
    assert finding_of(probe, "batch-size").diverged_trials == 1


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
    assert (probe.elapsed_s, probe.unwitnessed_trials) == (2, 0)
    assert finding_of(probe, "batch-size").n_trials == 1
    assert load_of(probe, "batch-size", 2).n_errors == 1
    failed = load_of(probe, "batch-size", 64, slot=None)
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
    assert finding_of(probe, "cache").n_trials == 0
    assert (probe.n_trials, probe.diverged_trials) == (1, 1)


def test_a_trial_whose_baseline_failed_is_not_counted_for_its_axis(build):
    samples = [
        build.reference("ab"),
        build.error(1),
        build.sample(2, "ax", purpose="neighbours", baseline=1),
    ]
    assert finding_of(build.probe(samples), "neighbours").n_trials == 0


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
    assert finding_of(probe, "batch-size").n_trials == 0
    assert finding_of(probe, "run-to-run").diverged_trials == 1
    assert set(summary.samples.first_divergence.tolist()) == {-1}


# Bits


def test_latent_only(build):
    samples = [
        build.reference("abcd"),
        build.sample(1, "abcd", moved=(2, 3)),
        build.sample(2, "abcd"),
        build.sample(3, "abXd", moved=(1,)),
    ]
    summary = summarise(samples, build.spec)
    (probe,) = summary.probes
    assert (probe.n_trials, probe.diverged_trials, probe.latent_trials) == (3, 1, 1)
    finding = finding_of(probe, "batch-size")
    assert (finding.n_trials, finding.diverged_trials, finding.latent_trials) == (3, 1, 1)
    assert (finding.first_latent_min, finding.batch_sizes_latent) == (2, (2,))
    load = load_of(probe, "batch-size", 2)
    assert (load.latent, load.first_latent_min, load.trial_ids) == (1, 2, (1, 2, 3))
    assert summary.samples.latent_divergence.tolist() == [-1, 2, -1, 1]
    assert summary.samples.first_divergence.tolist() == [-1, -1, -1, 2]
    assert summary.samples.max_abs_dlogprob[1:].tolist() == [ULP, 0.0, ULP]


def test_a_trial_with_a_fork_in_one_row_is_diverged_not_latent(build):
    load = Load(2, (0, 1))
    samples = [
        build.reference("ab"),
        build.sample(1, "ab", load=load, moved=(0,)),
        build.sample(1, "ax", load=load, slot=1),
    ]
    probe = build.probe(samples)
    assert (probe.diverged_trials, probe.latent_trials) == (1, 0)


def test_bits_after_the_fork_say_nothing(build):
    samples = [build.reference("abcd"), build.sample(1, "aXcd", moved=(1, 2))]
    summary = summarise(samples, build.spec)
    assert summary.samples.latent_divergence.tolist() == [-1, -1]
    assert summary.samples.max_abs_dlogprob[1] == 0


def test_without_bits_there_is_no_latent_divergence_and_no_metric_of_them(build):
    samples = [build.reference("ab", bits=False), build.sample(1, "ab", bits=False)]
    summary = summarise(samples, build.spec)
    (probe,) = summary.probes
    assert probe.latent_trials == 0
    assert np.isnan(summary.samples.max_abs_dlogprob).all()
    metrics = probe.metrics
    assert metrics.avg_std_top1_prob is metrics.k1_kl is metrics.k3_kl is None


def test_margin_is_the_references_at_the_first_divergence(build):
    samples = [
        build.reference("abc", margins=(3.0, 0.25, math.inf)),
        build.sample(1, "aXc", margins=(9.0, 9.0, 9.0)),
        build.sample(2, "abX"),
    ]
    summary = summarise(samples, build.spec)
    np.testing.assert_array_equal(summary.samples.margin, [math.nan, 0.25, math.nan])
    assert [c.margin for c in summary.probes[0].completions] == [None, 0.25, None]


# Axes


def test_only_the_slot_differs(build):
    samples = [
        build.reference("ab"),
        build.sample(1, "ab"),
        build.sample(2, "ax", slot=1, purpose="slot", baseline=1),
        build.sample(3, "ab", purpose="neighbours", baseline=1),
    ]
    finding = finding_of(build.probe(samples), "slot")
    # Once alone it may be chance.
    assert (finding.n_trials, finding.diverged_trials, finding.rate) == (1, 1, None)
    samples.append(build.sample(4, "ax", slot=1, purpose="run-to-run", baseline=2))
    probe = build.probe(samples)
    finding = finding_of(probe, "slot")
    assert (finding.n_trials, finding.diverged_trials, finding.rate) == (1, 1, 1.0)
    assert (finding.rate_ci_low, finding.rate_ci_high) == clopper_pearson(1, 1, 0.95)
    assert (finding.first_divergence_min, finding.batch_sizes_diverged) == (1, (2,))
    assert {f.axis for f in probe.axes if f.diverged_trials} == {"slot"}


def test_rows_of_one_batch_are_evidence_on_the_slot(build):
    samples = [
        build.reference("ab"),
        *build.copies(1, ["ab", "ab", "ax"]),
        *build.copies(2, ["ab", "ab", "ab"], purpose="run-to-run", baseline=1),
    ]
    probe = build.probe(samples)
    slot = finding_of(probe, "slot")
    assert (slot.n_trials, slot.diverged_trials, slot.batch_sizes_diverged) == (2, 1, (3,))
    # Row 0 alone has a counterpart in the reference, and it is equal.
    assert finding_of(probe, "batch-size").diverged_trials == 0
    # The same load twice is compared row by row.
    assert finding_of(probe, "run-to-run").diverged_trials == 1


def test_rows_that_all_differ_from_the_reference_alike_are_not_laid_to_the_slot(build):
    samples = [build.reference("ab"), *build.copies(1, ["ax", "ax"])]
    probe = build.probe(samples)
    assert finding_of(probe, "slot").diverged_trials == 0
    assert finding_of(probe, "batch-size").diverged_trials == 1


def test_latent_difference_between_rows(build):
    load = Load(2, (0, 1))
    samples = [
        build.reference("ab"),
        build.sample(1, "ab", load=load),
        build.sample(1, "ab", load=load, slot=1, moved=(1,)),
    ]
    finding = finding_of(build.probe(samples), "slot")
    assert (finding.n_trials, finding.diverged_trials, finding.latent_trials) == (1, 0, 1)


def test_where_bits_first_differ_from_the_baseline_is_told_as_far_as_it_is_known(build):
    # The batch has other bits than the reference too: the earlier position parts the two.
    load = Load(2, (0,), (3,))
    samples = [
        build.reference("abcd"),
        build.sample(1, "abcd", moved=(2,)),
        build.sample(2, "abcd", purpose="neighbours", baseline=1, load=load, moved=(1, 2)),
    ]
    finding = finding_of(build.probe(samples), "neighbours")
    assert (finding.latent_trials, finding.first_latent_min) == (1, 1)
    samples[2] = build.sample(2, "abcd", purpose="neighbours", baseline=1, load=load, moved=(2, 3))
    finding = finding_of(build.probe(samples), "neighbours")
    assert (finding.latent_trials, finding.first_latent_min) == (1, None)


def test_a_load_names_its_trials_and_those_that_failed(build):
    samples = [
        build.reference("ab"),
        build.sample(1, "ab"),
        build.error(2),
    ]
    load = load_of(build.probe(samples), "batch-size", 2)
    assert (load.trial_ids, load.n_trials, load.n_errors) == ((1, 2), 1, 1)


def test_a_fork_in_one_row_and_moved_bits_in_another_are_one_diverged_trial(build):
    load = Load(3, (0, 1, 2))
    samples = [
        build.reference("ab"),
        build.sample(1, "ab", load=load),
        build.sample(1, "ab", load=load, slot=1, moved=(1,)),
        build.sample(1, "ax", load=load, slot=2),
    ]
    finding = finding_of(build.probe(samples), "slot")
    assert (finding.n_trials, finding.diverged_trials, finding.latent_trials) == (1, 1, 0)


def test_bits_that_only_one_of_two_trials_recorded_are_no_evidence(build):
    samples = [
        build.reference("ab"),
        build.sample(1, "ab", bits=False),
        build.sample(2, "ab", purpose="run-to-run", baseline=1),
    ]
    probe = build.probe(samples)
    assert (probe.latent_trials, sum(f.latent_trials for f in probe.axes)) == (0, 0)


def test_only_the_neighbours_differ(build):
    # The batch differs from the reference as well, but not along this axis.
    samples = [
        build.reference("abc"),
        build.sample(1, "axc", batch_size=8),
        build.sample(2, "axy", purpose="neighbours", baseline=1, load=Load(8, (0,), (4,) * 7)),
        build.sample(3, "axc", purpose="neighbours", baseline=1, load=Load(8, (0,), (5,) * 7)),
        build.sample(4, "axc", batch_size=8, purpose="run-to-run", baseline=1),
    ]
    probe = build.probe(samples)
    finding = finding_of(probe, "neighbours")
    assert (finding.n_trials, finding.diverged_trials) == (2, 1)
    assert (finding.first_divergence_min, finding.batch_sizes_diverged) == (2, (8,))
    assert finding_of(probe, "run-to-run").diverged_trials == 0
    assert finding_of(probe, "batch-size").diverged_trials == 1
    assert probe.diverged_trials == 4


def test_axes_without_evidence_are_listed_only_if_asked_for(build):
    samples = [build.reference("ab"), build.sample(1, "ab")]
    probe = build.probe(samples, axes=("cache",))
    assert [f.axis for f in probe.axes] == ["batch-size", "cache"]
    assert [f.axis for f in build.probe(samples).axes] == list(AXES)


# Loads


def test_loads_by_kind(build):
    samples = [
        build.reference("abc", elapsed_s=0.5),
        build.sample(1, "abc", batch_size=4, elapsed_s=2.0),
        build.sample(2, "abx", batch_size=4, elapsed_s=1.0, achieved=3),
        build.sample(3, "xbc", batch_size=4, elapsed_s=1.0, achieved=None),
        *build.copies(4, ["abc", "abx"], elapsed_s=2.0),
        build.sample(5, "abc", load=Load(1, cache_state="chunked"), purpose="cache", elapsed_s=0.0),
    ]
    probe = build.probe(samples)
    assert [(x.axis, x.batch_size, x.slot, x.cache_state) for x in probe.loads] == [
        ("reference", 1, 0, "whole"),
        ("batch-size", 2, None, "whole"),
        ("batch-size", 4, 0, "whole"),
        ("cache", 1, 0, "chunked"),
    ]
    four = load_of(probe, "batch-size", 4)
    assert (four.n_trials, four.n_samples, four.n_errors, four.n_unique) == (3, 3, 0, 3)
    assert (four.n_diverged_trials, four.first_divergence_min) == (2, 0)
    assert (four.first_divergence_median, four.latent) == (1.0, 0)
    assert (four.achieved_batch_size_min, four.elapsed_s) == (3, 4.0)
    assert four.tokens_per_s == 9 / 4
    copies = load_of(probe, "batch-size", 2, slot=None)
    assert (copies.n_trials, copies.n_samples, copies.n_unique) == (1, 2, 2)
    assert (copies.elapsed_s, copies.tokens_per_s) == (2.0, 3.0)  # two rows of three tokens
    assert load_of(probe, "cache", 1).tokens_per_s is None
    assert (probe.elapsed_s, probe.tokens_per_s) == (6.5, 21 / 6.5)


def test_unwitnessed_trials(build):
    samples = [
        build.reference("ab"),
        build.sample(1, "ab"),
        build.sample(2, "ab", achieved=1),
        build.sample(3, "ab", achieved=None),
        *build.copies(4, ["ab", "ab"], achieved=None),
    ]
    assert build.probe(samples).unwitnessed_trials == 3


# Control


def judge_control(build, **fields):
    control = {"purpose": "control", "batch_size": 1, "fault": Fault(latent_at=1, fork_at=3)}
    samples = [build.reference("abcdef"), build.sample(1, **(control | fields))]
    return summarise(samples, build.spec)


def test_a_control_is_caught_where_it_was_planted_and_counts_nowhere_else(build):
    summary = judge_control(build, text="abcXef", moved=(1, 2))
    (probe,) = summary.probes
    assert (probe.control.n_trials, probe.control.n_caught) == (1, 1)
    assert (probe.n_samples, probe.n_trials, probe.n_unique, probe.elapsed_s) == (1, 0, 1, 1.0)
    assert [load.axis for load in probe.loads] == ["reference"]
    assert summary.samples.completion_id.tolist() == [1, -1]
    assert summary.samples.first_divergence.tolist() == [-1, -1]


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "abcdef", "moved": (1,)},  # no fork
        {"text": "abcdXf", "moved": (1,)},  # a late one
        {"text": "aXcdef"},  # an early one
        {"text": "abcXef"},  # no latent divergence
        {"text": "abcXef", "moved": (2,)},  # a late one
        {"text": "abcXef", "moved": (0, 1)},  # something differs before the fault
        {"text": "abcXef", "moved": (1,), "baseline": 9},
        {"text": "abcXef", "moved": (1,), "fault": None},
    ],
)
def test_a_control_is_missed(build, fields):
    control = judge_control(build, **fields).probes[0].control
    assert (control.n_trials, control.n_caught) == (1, 0)


def test_without_bits_the_fork_decides(build):
    (probe,) = judge_control(build, text="abcXef", bits=False).probes
    assert (probe.control.n_trials, probe.control.n_caught) == (1, 1)


def test_failed_controls_are_not_counted(build):
    samples = [build.reference("abcd"), build.error(1, purpose="control")]
    probe = build.probe(samples)
    assert (probe.control.n_trials, probe.n_errors, len(probe.loads)) == (0, 0, 1)


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


# Metrics


def test_agreement(build):
    agreeing = [build.reference("ab"), build.sample(1, "ab")]
    assert build.probe(agreeing).metrics.tar_r == 1
    assert build.probe([*agreeing, build.sample(2, "ax")]).metrics.tar_r == 0
    assert build.probe(agreeing[:1]).metrics.tar_r is None


@pytest.mark.parametrize(
    ("pattern", "agreement"),
    [
        (None, None),
        (r"=(\d)", 1.0),  # the last match's group
        (r"=\d", 1.0),  # or all of it
        (r"^.", 1.0),
        (r"^.(.)", 0.0),
        (r"^(x=1)?", 0.0),  # one has no answer
    ],
)
def test_agreement_of_answers(build, pattern, agreement):
    samples = [build.reference("x=1 =2"), build.sample(1, "xy =2")]
    assert build.probe(samples, answer_pattern=pattern).metrics.tar_a == agreement


def test_position_and_rate_of_divergence(build):
    samples = [
        build.reference("abcd"),
        build.sample(1, "abcd"),
        build.sample(2, "aXcd"),
        build.sample(3, "abcX"),
        build.sample(4, "abcX"),
    ]
    metrics = build.probe(samples).metrics
    assert metrics.div_index == pytest.approx((1 + 3 + 3) / 3)
    # 4 steps of the sample that agrees, then 2, 4 and 4 up to and with the divergence.
    assert metrics.flip_rate_per_step == pytest.approx(3 / 14)
    assert build.probe(samples[:2]).metrics.div_index is None
    assert build.probe(samples[:2]).metrics.flip_rate_per_step == 0


def test_probabilities_on_the_shared_prefix(build):
    def with_probabilities(trial_id, text, *probabilities):
        make = build.sample if trial_id else build.reference
        logprobs = tuple(np.log(np.array(probabilities, np.float32)).tolist())
        return make(trial_id=trial_id, text=text, logprobs=logprobs)

    samples = [
        with_probabilities(0, "abc", 0.5, 0.8, 0.9),
        with_probabilities(1, "abc", 0.25, 0.8, 0.1),
        with_probabilities(2, "abX", 0.5, 0.4, 0.2),
    ]
    metrics = build.probe(samples).metrics
    spread = np.std([[0.5, 0.25, 0.5], [0.8, 0.8, 0.4]], axis=1).mean()
    assert metrics.avg_std_top1_prob == pytest.approx(spread, rel=1e-6)
    # Sample 1 shares three tokens with the reference, sample 2 two.
    rho = np.array([0.25 / 0.5, 1, 0.1 / 0.9, 1, 0.4 / 0.8])
    assert metrics.k1_kl == pytest.approx(-np.log(rho).mean(), rel=1e-6)
    assert metrics.k3_kl == pytest.approx((rho - 1 - np.log(rho)).mean(), rel=1e-6)


def test_equal_probabilities_have_no_spread_at_all(build):
    metrics = build.probe([build.reference("ab"), *build.copies(1, ["ab"] * 7)]).metrics
    assert metrics.avg_std_top1_prob == metrics.k1_kl == metrics.k3_kl == 0


def test_a_model_that_computes_nan_has_no_such_metric(build):
    samples = [build.reference("ab"), build.sample(1, "ab", logprobs=(math.nan, -math.inf))]
    metrics = build.probe(samples).metrics
    assert metrics.avg_std_top1_prob is metrics.k1_kl is metrics.k3_kl is None


# Order

RUNS = st.lists(
    st.lists(st.tuples(st.text("ab", max_size=3), st.sampled_from([(), (0,), (1,)])), min_size=1),
    max_size=5,
)


@given(RUNS, st.randoms())
def test_the_order_of_the_stream_does_not_matter(build, trials, random):
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
