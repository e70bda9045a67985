import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from ndcheck.analysis.statistics import (
    chao1,
    clopper_pearson,
    fisher_exact,
    good_turing_unseen_mass,
    k1_kl,
    k3_kl,
    trials_needed,
)

INTERVALS = {n: [clopper_pearson(k, n, 0.95) for k in range(n + 1)] for n in (1, 10, 45, 200)}


def binomial_tail(k: int, n: int, rate: float) -> float:
    """P(X >= k)."""
    return sum(math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize("n", [1, 2, 5, 45, 368])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_interval_equals_scipys_for_every_count(n, confidence):
    for k in range(n + 1):
        exact = binomtest(k, n).proportion_ci(confidence, method="exact")
        assert clopper_pearson(k, n, confidence) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("n", [1, 10, 45, 200])
@given(rate=st.floats(1e-9, 1))
def test_interval_covers_every_rate_at_its_confidence(n, rate):
    """Summed over all counts, with SciPy's probabilities: no rate is missed too often."""
    covered = [low <= rate <= high for low, high in INTERVALS[n]]
    assert binom.pmf(np.arange(n + 1), n, rate)[covered].sum() >= 0.95 - 1e-9


def test_known_interval():
    # 5 of 10 at 95 %: a textbook value.
    low, high = clopper_pearson(5, 10, 0.95)
    assert (round(low, 4), round(high, 4)) == (0.1871, 0.8129)


def test_no_trial_excludes_nothing():
    assert clopper_pearson(0, 0, 0.95) == (0.0, 1.0)


@given(st.integers(1, 30), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_interval_ends_where_the_count_gets_too_unlikely(n, data, confidence):
    k = data.draw(st.integers(0, n))
    low, high = clopper_pearson(k, n, confidence)
    alpha = 1 - confidence
    assert low <= k / n <= high
    if k > 0:
        assert binomial_tail(k, n, low) == pytest.approx(alpha / 2)
    else:
        assert low == 0
    if k < n:
        assert 1 - binomial_tail(k + 1, n, high) == pytest.approx(alpha / 2)
    else:
        assert high == 1


@pytest.mark.parametrize(
    ("rate", "confidence", "n"), [(0.01, 0.95, 368), (0.001, 0.95, 3688), (0.5, 0.75, 3)]
)
def test_trials_needed(rate, confidence, n):
    assert trials_needed(rate, confidence) == n


@given(st.floats(1e-4, 0.9), st.sampled_from([0.9, 0.95, 0.99]))
def test_trials_needed_is_the_smallest_number_that_excludes_the_rate(rate, confidence):
    n = trials_needed(rate, confidence)
    assert clopper_pearson(0, n, confidence)[1] <= rate * (1 + 1e-6)
    assert n == 1 or clopper_pearson(0, n - 1, confidence)[1] > rate * (1 - 1e-6)


@given(st.integers(0, 25), st.integers(0, 25), st.data())
def test_fisher_equals_exact_enumeration(n_a, n_b, data):
    a, b = data.draw(st.integers(0, n_a)), data.draw(st.integers(0, n_b))
    n_events = a + b
    weights = {
        i: math.comb(n_a, i) * math.comb(n_b, n_events - i)
        for i in range(max(0, n_events - n_b), min(n_a, n_events) + 1)
    }
    expected = Fraction(sum(w for w in weights.values() if w <= weights[a]), sum(weights.values()))
    assert fisher_exact(a, n_a, b, n_b) == pytest.approx(float(expected))


def test_fisher_known_values():
    # Fisher's tea tasting, 3 of 4 against 1 of 4; and a table of a million trials.
    assert fisher_exact(3, 4, 1, 4) == pytest.approx(34 / 70)
    assert fisher_exact(40, 500_000, 0, 500_000) == pytest.approx(2 * 0.5**40, rel=1e-2)


def test_unseen_completions():
    assert good_turing_unseen_mass(3, 12) == 0.25
    # U + (N - 1)/N f1 (f1 - 1) / (2 (f2 + 1)) = 5 + 9/10 * 3 * 2 / (2 * 2)
    assert chao1(5, 3, 1, 10) == pytest.approx(6.35)
    assert chao1(5, 0, 2, 10) == 5


def test_kl_estimators():
    reference = np.log(np.array([0.5, 0.8], np.float32))
    sample = np.log(np.array([0.25, 0.8], np.float32))
    assert k1_kl(reference, sample) == pytest.approx(math.log(2) / 2, rel=1e-6)
    assert k3_kl(reference, sample) == pytest.approx((0.5 - 1 + math.log(2)) / 2, rel=1e-6)
    assert k1_kl(reference, reference) == k3_kl(reference, reference) == 0


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1))
def test_k3_is_never_negative(pairs):
    reference, sample = np.array(pairs, np.float32).T
    assert k3_kl(reference, sample) >= 0
