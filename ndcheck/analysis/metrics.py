"""Published metrics, computed from running sums and from the distinct completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.summary import Metrics
from ndcheck.analysis.unique import Completions


class Deviation(NamedTuple):
    """How log-probabilities deviate from the reference's over ``n_tokens`` shared ones.

    ``largest`` is the largest absolute difference, NaN without a shared token. ``terms`` have shape
    [4, n_tokens], as `LogprobSums` adds them up; None where nothing deviates.
    """

    n_tokens: int
    largest: float
    terms: NDArray[np.float64] | None


class LogprobSums:
    """Running sums over the tokens that samples share with the reference, itself left out."""

    def __init__(self, reference: NDArray[np.float32]) -> None:
        """``reference`` holds the log-probabilities of its chosen tokens, shape [T], in nats."""
        self._reference = reference.astype(np.float64)
        self._bits = reference.tobytes() if np.isfinite(reference).all() else None
        # By position, over samples. Deviations from the reference give equal samples exactly no
        # spread; rho is the sample's probability over the reference's.
        self._sums = np.zeros((4, len(reference)))
        self._log_rho, self._k3, self._rho_minus_1, self._squares = self._sums
        self._n_tokens = self._n_samples = 0

    def compare(self, logprobs: NDArray[np.float32], n_shared: int) -> Deviation:
        """What `add` counts of each sample with these ``logprobs``."""
        n = min(n_shared, len(logprobs), len(self._reference))
        if not n:
            return Deviation(0, np.nan, None)
        if logprobs.tobytes() == self._bits:
            return Deviation(n, 0.0, None)
        log_rho = logprobs[:n] - self._reference[:n]
        largest = float(np.abs(log_rho).max())
        if not largest:
            return Deviation(n, largest, None)
        rho_minus_1 = np.expm1(log_rho)
        terms = np.stack((log_rho, rho_minus_1 - log_rho, rho_minus_1, rho_minus_1 * rho_minus_1))
        return Deviation(n, largest, terms)

    def add(self, deviation: Deviation) -> float:
        """Count one sample; returns its largest absolute difference."""
        if deviation.n_tokens:
            self._n_tokens += deviation.n_tokens
            self._n_samples += 1
        if deviation.terms is not None:
            self._sums[:, : deviation.n_tokens] += deviation.terms
        return deviation.largest

    def k1_kl(self) -> float | None:
        """`statistics.k1_kl` over the shared tokens of all samples."""
        return _known(-self._log_rho.sum() / self._n_tokens) if self._n_tokens else None

    def k3_kl(self) -> float | None:
        """`statistics.k3_kl` over the shared tokens of all samples."""
        return _known(self._k3.sum() / self._n_tokens) if self._n_tokens else None

    def mean_std(self, n_shared: int) -> float | None:
        """Population std of the probability over samples, mean over the first tokens."""
        n = min(n_shared, len(self._reference))
        if not n or not self._n_samples:
            return None
        n_samples = self._n_samples + 1
        mean = self._rho_minus_1[:n] / n_samples
        variance = np.maximum(self._squares[:n] / n_samples - mean**2, 0)
        return _known((np.exp(self._reference[:n]) * np.sqrt(variance)).mean())


def _known(value: np.float64) -> float | None:
    """A model that computes NaN has no such metric."""
    return float(value) if np.isfinite(value) else None


def measure(
    completions: Completions,
    common_prefix: int,
    sums: LogprobSums | None,
    answers: Iterable[str | None] | None,
) -> Metrics:
    """All metrics of one probe in one arm. ``sums`` is None where there is no reference.

    ``answers`` are those of the completions; None where none were asked for.
    """
    return Metrics(
        tar_r=_agreement(completions.texts(), completions.n_samples),
        tar_a=_agreement(answers, completions.n_samples),
        div_index=_mean_divergence(completions),
        avg_std_top1_prob=sums.mean_std(common_prefix) if sums else None,
        k1_kl=sums.k1_kl() if sums else None,
        k3_kl=sums.k3_kl() if sums else None,
        flip_rate_per_step=_flip_rate(completions),
    )


def _agreement(answers: Iterable[str | None] | None, n_samples: int) -> float | None:
    """1 if all answers are equal, 0 if not; None without answers, or one sample to compare."""
    if answers is None or n_samples < 2:
        return None
    answers = iter(answers)
    first = next(answers)
    return float(all(answer == first for answer in answers))


def _mean_divergence(completions: Completions) -> float | None:
    diverged = completions.first_divergences >= 0
    if not diverged.any():
        return None
    return float(
        np.average(completions.first_divergences[diverged], weights=completions.counts[diverged])
    )


def _flip_rate(completions: Completions) -> float | None:
    """A sample is at risk at every step until it diverges, the diverging step included."""
    if completions.reference is None:
        return None
    counts = completions.counts.copy()
    counts[completions.reference] -= 1  # the reference cannot diverge from itself
    diverged = completions.first_divergences >= 0
    steps = np.where(diverged, completions.first_divergences + 1, completions.lengths)
    n_steps = int((counts * steps).sum())
    return int(counts[diverged].sum()) / n_steps if n_steps else None
