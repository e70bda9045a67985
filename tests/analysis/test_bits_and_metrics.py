"""What bits and log-probabilities say, where they are known."""

import math

import numpy as np
import pytest

from ndcheck.analysis.summarising import summarise
from ndcheck.records import Load

ULP = 2.0**-24


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
    finding = build.finding(probe, "batch-size")
    assert (finding.n_trials, finding.diverged_trials, finding.latent_trials) == (3, 1, 1)
    assert (finding.first_latent_min, finding.batch_sizes_latent) == (2, (2,))
    load = build.load(probe, "batch-size", 2)
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
