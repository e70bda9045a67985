"""Exact statistics on trials, and the published estimators on completions.

A *trial* is one batch: its rows are one draw, so trials are what gets counted here, not rows.
SciPy is imported where it is used, because importing it takes longer than most calls.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logprobs = NDArray[np.float32] | NDArray[np.float64]


@cache
def clopper_pearson(n_events: int, n_draws: int, confidence: float) -> tuple[float, float]:
    """Exact two-sided interval for a rate of which ``n_events`` were seen in ``n_draws``.

    With alpha = 1 - confidence: the beta quantiles at alpha/2 and 1 - alpha/2, for every count
    alike (Clopper and Pearson, Biometrika 1934). At 0 events the ends are 0 and
    1 - (alpha/2)^(1/n); without a draw, 0 and 1. Independent draws of one rate are covered with a
    probability of at least ``confidence``.
    """
    alpha = 1 - confidence
    if n_draws == 0:
        return 0.0, 1.0
    from scipy.special import betaincinv

    low, high = 0.0, 1.0
    if n_events > 0:
        low = float(betaincinv(n_events, n_draws - n_events + 1, alpha / 2))
    if n_events < n_draws:
        high = float(betaincinv(n_events + 1, n_draws - n_events, 1 - alpha / 2))
    return low, high


MOST_DRAWS = 1e15
"""More than any run has."""


def trials_needed(rate: float, confidence: float) -> int:
    """Clean draws that exclude a rate of ``rate`` or more: ceil(ln(alpha/2) / ln(1 - rate)).

    0 < ``rate`` < 1. It is `clopper_pearson` at 0 events, solved for n: 368 for 1 % at 95 %; at
    most MOST_DRAWS.
    """
    n_draws = min(math.log((1 - confidence) / 2) / math.log1p(-rate), MOST_DRAWS)
    # Rounding keeps a whole number that floating point missed by a hair from being raised by one.
    return math.ceil(round(n_draws, 9))


def fisher_exact(events_a: int, n_a: int, events_b: int, n_b: int) -> float:
    """Two-sided p-value that two groups of trials share one rate (Fisher's exact test).

    The sum of the hypergeometric probabilities, given both margins, of every table that is no
    likelier than the one seen; 1 where a group is empty.
    """
    from scipy.special import gammaln

    def log_choose(n: int, k: NDArray[np.int64]) -> NDArray[np.float64]:
        log: NDArray[np.float64] = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
        return log

    n_events = events_a + events_b
    k = np.arange(max(0, n_events - n_b), min(n_a, n_events) + 1)  # events in a, every table
    log_weight = log_choose(n_a, k) + log_choose(n_b, n_events - k)
    weight = np.exp(log_weight - log_weight.max())
    seen = weight[events_a - k[0]]
    # Tables exactly as likely as the one seen count too: the slack is for their rounding error.
    return float(min(1.0, weight[weight <= seen * (1 + 1e-7)].sum() / weight.sum()))


def good_turing_unseen_mass(n_novel: int, n_draws: int) -> float:
    """Estimated probability that one more draw shows something not seen so far: f1 / N.

    ``n_novel`` counts the draws that showed something no other draw showed (Good, Biometrika
    1953: the leave-one-out estimate). It says nothing where only one kind was ever seen.
    """
    return n_novel / n_draws


def chao1(n_seen: int, n_once: int, n_twice: int, n_draws: int) -> float:
    """Lower bound on the number of kinds, seen and unseen.

    Bias-corrected: U + ((N - 1) / N) f1 (f1 - 1) / (2 (f2 + 1)), of which ``n_once`` = f1 and
    ``n_twice`` = f2 kinds were seen in exactly one and two of ``n_draws`` = N draws (Chao,
    Scandinavian Journal of Statistics 1984). It says nothing where only one kind was ever seen.
    """
    return n_seen + (n_draws - 1) / n_draws * n_once * (n_once - 1) / (2 * (n_twice + 1))


def k1_kl(reference: Logprobs, sample: Logprobs) -> float:
    """KL(reference || sample) by the k1 estimator: the mean of -ln rho, in nats per token.

    Both hold the log-probabilities of the same tokens, shape [T] with T >= 1;
    rho = p_sample / p_reference (Schulman, "Approximating KL divergence", 2020). The estimator is
    unbiased for tokens drawn from the reference; of greedy tokens it is a plain mean.
    """
    return float((reference.astype(np.float64) - sample).mean())


def k3_kl(reference: Logprobs, sample: Logprobs) -> float:
    """The same by the k3 estimator, rho - 1 - ln rho: never negative, of lower variance."""
    log_rho = sample.astype(np.float64) - reference
    return float((np.expm1(log_rho) - log_rho).mean())


def is_settled(most: Any, next_most: Any, total: Any) -> Any:
    """Is the commonest of several completions, by its counts, more than chance?

    A sign test at two standard deviations of the most frequent one against the next; arrays too.
    """
    return (next_most == 0) | ((most - next_most) ** 2 >= 4 * total)
