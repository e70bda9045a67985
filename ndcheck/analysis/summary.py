"""What a set of samples shows: the one structure that every report and verdict reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.serving import ServingFinding
from ndcheck.analysis.tree import Fork
from ndcheck.records import Arm, Axis, CacheState


@dataclass(frozen=True, slots=True)
class Completion:
    """One distinct completion by token ids; ``completion_id`` counts from 1, most frequent first.

    ``n_trials`` counts the batches it was seen in, the reference's included. ``first_divergence``
    is against the reference: None for the reference's own completion, and where there is no
    reference. ``divergent_token`` and ``reference_token`` are the competing token texts there,
    empty where one side had ended; ``margin`` is the reference's. ``finish_reason`` is that of
    the first sample; ``sha256`` is of the token ids as little-endian 32-bit integers.
    """

    completion_id: int
    count: int
    n_trials: int
    share: float
    first_divergence: int | None
    divergent_token: str | None
    reference_token: str | None
    margin: float | None
    n_tokens: int
    finish_reason: str
    sha256: str
    token_ids: NDArray[np.int32]
    token_texts: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.token_texts)


@dataclass(frozen=True, slots=True)
class AxisFinding:
    """One invariance property: trials compared with the baseline that differs along it only.

    ``rate_ci_*`` is Clopper-Pearson at ``confidence``, the upper end alone (1 - alpha^(1/n))
    where nothing diverged. ``first_divergence_min`` and ``batch_sizes_diverged`` are over the
    trials whose tokens diverged.
    """

    axis: Axis
    n_trials: int
    diverged_trials: int
    latent_trials: int
    rate: float | None
    rate_ci_low: float | None
    rate_ci_high: float | None
    first_divergence_min: int | None
    batch_sizes_diverged: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadFinding:
    """All trials of one kind of load, compared with the reference.

    ``slot`` is None where the load has several. The first divergences are over trials, each at
    its earliest row; ``latent`` counts trials. ``elapsed_s`` is the sum over trials;
    ``tokens_per_s`` counts the probe's tokens, not the fillers'.
    """

    axis: Axis
    batch_size: int
    slot: int | None
    cache_state: CacheState
    n_trials: int
    n_samples: int
    n_errors: int
    n_unique: int
    n_diverged_trials: int
    first_divergence_min: int | None
    first_divergence_median: float | None
    latent: int
    achieved_batch_size_min: int | None
    elapsed_s: float
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class ControlFinding:
    """Did the planted fault show where it was planted?

    A control is caught if nothing differs from its baseline before the planted latent divergence,
    that shows exactly where it was planted, and so does the fork. Where the backend records no
    bits, the fork alone decides. Failed controls are not counted; those that hold no fault, or
    whose baseline failed, are not caught.
    """

    n_trials: int
    n_caught: int


@dataclass(frozen=True, slots=True)
class Metrics:
    """Published metrics under their names (None where the samples cannot give them)."""

    tar_r: float | None
    """TARr@N (Atil 2024): 1 if all N raw completions agree, else 0; a share over probes."""
    tar_a: float | None
    """TARa@N (Atil 2024): the same for answers parsed by the run's answer pattern."""
    div_index: float | None
    """Div_Index (Yuan 2025): mean first-divergence position over diverged samples."""
    avg_std_top1_prob: float | None
    """Avg_Std@top1_prob (Yuan 2025): std of the chosen token's probability over samples,
    averaged over the positions that all samples share."""
    k1_kl: float | None
    """k1 estimate of KL(reference || sample) on shared prefixes, mean per token, in nats."""
    k3_kl: float | None
    """k3 = rho - 1 - ln rho, mean per token, in nats."""
    flip_rate_per_step: float | None
    """First divergences per decode step at risk."""


@dataclass(frozen=True, slots=True)
class ProbeSummary:
    """One probe in one arm; controls count in ``control`` only, failed samples in ``n_errors``.

    ``divergence_rate`` is of trials, against the reference: the probe alone in its batch. Trials
    that are only a baseline of others are no evidence in it, though their samples count. Without
    a reference nothing can be compared, so ``n_trials`` is 0.

    ``unseen_mass`` and ``chao1`` take trials as draws, the reference's included, since the rows of
    one batch are one draw: a completion's frequency is the number of trials it was seen in.
    They are None at one unique completion, of which they say nothing.

    ``slowdown_vs_stock`` is the median, over the loads that both arms ran, of the ratio of their
    mean elapsed times. ``tokens_per_s`` counts the probe's tokens, not the fillers'.
    """

    arm: Arm
    probe_id: str
    n_trials: int
    n_samples: int
    n_errors: int
    n_unique: int
    modal_count: int
    common_prefix_tokens: int
    diverged_trials: int
    latent_trials: int
    divergence_rate: float | None
    rate_ci_low: float | None
    rate_ci_high: float | None
    confidence: float
    unseen_mass: float | None
    chao1: float | None
    unwitnessed_trials: int
    elapsed_s: float
    tokens_per_s: float | None
    slowdown_vs_stock: float | None
    completions: Sequence[Completion]
    axes: tuple[AxisFinding, ...]
    loads: tuple[LoadFinding, ...]
    control: ControlFinding
    tree: Fork | None
    metrics: Metrics
    serving: ServingFinding | None = None
    """Of a server's answers; None where the model ran in this process."""


@dataclass(frozen=True, slots=True)
class SampleColumns:
    """Per-sample outcomes in file order; -1 (integers) and NaN (floats) mean none.

    Against the reference, which itself has none, like errors and controls. ``margin`` is the
    reference's at the first divergence, in logits; ``max_abs_dlogprob`` is in nats, over the
    tokens shared with the reference.
    """

    completion_id: NDArray[np.int32]
    first_divergence: NDArray[np.int32]
    latent_divergence: NDArray[np.int32]
    margin: NDArray[np.float32]
    max_abs_dlogprob: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Summary:
    """All probes and arms of a run."""

    probes: tuple[ProbeSummary, ...]
    samples: SampleColumns
    fisher_p: float | None
    """Fisher's exact test, two-sided, on diverged trials: stock against invariant."""
