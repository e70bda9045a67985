"""What a set of samples shows: the one structure that every report and verdict reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.serving import ServingFinding
from ndcheck.analysis.tree import Fork
from ndcheck.records import Arm, Axis, CacheState, Purpose

Draw = Literal["load", "trial"]
"""What a rate counts. In process, a load that is run again gives what it gave before: each distinct
load is one draw. A server forms every batch anew, and what is random differs at every repeat: there
each trial is one."""


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
class FedTokens:
    """All tokens that were fed again, each compared with the same one decoded.

    Of ``n_tokens``, ``n_other_bits`` have other logits or another log-probability, and
    ``n_other_tokens`` would have been chosen otherwise. ``width_classes`` by batch size: the widths
    of passes, 1 for decoding, that give all logits the same bits, each class ascending; empty along
    ``scoring``, and where no batch size has two widths that were full.
    """

    n_tokens: int
    n_other_bits: int
    n_other_tokens: int
    width_classes: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class DraftFinding:
    """Speculative decoding with a draft model, compared with decoding one token at a time.

    Of ``n_proposed`` tokens in ``n_passes``, ``n_accepted`` were. ``widths_diverged`` are those of
    passes whose completion is another, ``widths_latent`` those of which bits alone are.
    """

    n_trials: int
    n_passes: int
    n_proposed: int
    n_accepted: int
    widths_diverged: tuple[int, ...]
    widths_latent: tuple[int, ...]

    @property
    def mean_accepted_length(self) -> float | None:
        """Accepted tokens of a pass; None where nothing was proposed."""
        return self.n_accepted / self.n_passes if self.n_passes else None


@dataclass(frozen=True, slots=True)
class Counts:
    """How many trials there were, and how many of them diverged, or did in bits only."""

    n_trials: int = 0
    diverged_trials: int = 0
    latent_trials: int = 0


NO_TRIALS = Counts()


@dataclass(frozen=True, slots=True)
class AxisFinding:
    """One invariance property: trials compared with the baseline that differs along it only.

    Along ``run-to-run`` the trials are those of loads that ran more than once, each compared with
    the commonest completion of its load; loads that were only repeated because they had diverged
    are no draws. ``rate`` and ``rate_ci_*`` are over the draws, which
    ``draw`` names: two-sided Clopper-Pearson at ``confidence``, for each axis by itself.
    ``first_divergence_min`` and ``batch_sizes_diverged`` are over the trials whose tokens diverged,
    ``first_latent_min`` and ``batch_sizes_latent`` over those in which bits alone differed. Of
    positions only those of the bits against the reference are kept: where a trial and its baseline
    both leave it at one position, or the backend gave no bits by position, ``first_latent_min``
    leaves the trial out.
    ``n_confirmed`` counts the distinct loads that diverged and ran more than once. ``told_apart``
    is False where what diverged may be run-to-run, and None where nothing diverged. Where repeats
    diverged too it is True for what was seen of the probe alone; either way some of what diverged
    may be run-to-run, and the axis has no rate.
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
    draw: Draw
    n_draws: int
    diverged_draws: int
    latent_draws: int
    n_confirmed: int
    told_apart: bool | None
    first_latent_min: int | None
    batch_sizes_latent: tuple[int, ...]
    tokens: FedTokens | None = None
    """Along ``width`` and ``scoring``: token by token; None along the others."""
    drafted: DraftFinding | None = None
    """Along ``width``, where a draft model proposed tokens."""
    alone: Counts = NO_TRIALS
    """Of the trials, those at batch size 1."""

    @property
    def feeds_other_tokens(self) -> bool:
        return self.tokens is not None and self.tokens.n_other_tokens > 0

    @property
    def feeds_other_bits(self) -> bool:
        return self.tokens is not None and self.tokens.n_other_bits > 0

    @property
    def all_trials(self) -> Counts:
        return Counts(self.n_trials, self.diverged_trials, self.latent_trials)

    @property
    def shown(self) -> tuple[int, int, int]:
        """How many are reported, and of them diverged, or did in bits only: none is left out."""
        if self.axis == "run-to-run":
            return self.n_trials, self.diverged_trials, self.latent_trials
        return self.n_draws, self.diverged_draws, self.latent_draws


@dataclass(frozen=True, slots=True)
class LoadFinding:
    """All trials of one kind of load, compared with the reference.

    ``axis`` is what its trials were for: "reference" for the probe alone, which has no axis.
    ``slot`` is None where the load has several. The first divergences are over trials, each at
    its earliest row; ``latent`` counts trials in which bits alone differ, ``first_latent_min`` is
    the earliest position at which they do. ``elapsed_s`` is the sum over trials; ``tokens_per_s``
    counts the probe's tokens, not the fillers', and is None where none were generated.
    ``trial_ids`` are in ascending order, those that failed among them.
    """

    axis: Purpose
    batch_size: int
    slot: int | None
    cache_state: CacheState
    width: int
    scores: bool
    drafts: bool
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
    first_latent_min: int | None
    trial_ids: tuple[int, ...]
    answer_flips: int | None = None
    """Trials in which any answer is another than the reference's; None without answers."""
    n_correct: int | None = None
    """Samples with the right answer; None where it is not known."""

    @property
    def is_decoded(self) -> bool:
        """Are all tokens generated one by one?"""
        return self.width == 1 and not self.scores

    @property
    def holds_copies(self) -> bool:
        """Is the probe in several rows?"""
        return self.slot is None


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
    controlled: tuple[Axis, ...] = ()
    """The axes with a control of their own that was caught: ``width`` and ``scoring``."""
    controls_draft: bool = False
    """Was one caught in speculative decoding?"""


@dataclass(frozen=True, slots=True)
class AnswerFinding:
    """What the completions answer, beside what they are.

    ``answers`` are those of the completions, in their order; None where one holds none, which is
    an answer of its own. A trial's flips where any of its rows answers otherwise than the
    reference. ``n_correct`` counts samples; None where the right answer is not known.
    """

    answers: tuple[str | None, ...]
    n_unique: int
    n_without: int
    flipped_trials: int
    flipped_draws: int
    n_correct: int | None


@dataclass(frozen=True, slots=True)
class Metrics:
    """Published metrics under their names (None where the samples cannot give them)."""

    tar_r: float | None
    """TARr@N (Atil 2024): 1 if all N raw completions agree, else 0; a share over probes."""
    tar_a: float | None
    """TARa@N (Atil 2024): the same for answers parsed by the run's pattern or kind; None
    where that takes too long."""
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


@dataclass(frozen=True)
class ProbeSummary:
    """One probe in one arm; controls count in ``control`` only, failed samples in ``n_errors``.

    The reference is the commonest completion of the probe alone in its batch, over all the trials
    of that; the first of these that gave it is compared with nothing and is not in ``n_trials``.
    ``divergence_rate`` and its interval are over the draws, which ``draw`` names: the share that
    differs from the reference, given the reference. Without one nothing can be compared, so
    ``n_trials`` is 0.

    ``n_unique_bits`` counts completions that differ in tokens or, where recorded, in bits.

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
    first_error: str
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
    find_tree: Callable[[], Fork | None] = field(repr=False)
    measure: Callable[[], Metrics] = field(repr=False)
    draw: Draw
    n_draws: int
    diverged_draws: int
    latent_draws: int
    n_unique_bits: int
    serving: ServingFinding | None = None
    """Of a server's answers; None where the model ran in this process."""
    answers: AnswerFinding | None = None
    """None where none were asked for, or finding them takes too long."""

    # Of thousands of prompts the reports show these of the worst alone.
    @cached_property
    def tree(self) -> Fork | None:
        return self.find_tree()

    @cached_property
    def metrics(self) -> Metrics:
        return self.measure()

    @property
    def has_diverged(self) -> bool:
        """Do the tokens of any two completions differ, in whatever comparison?"""
        is_fed_otherwise = any(finding.feeds_other_tokens for finding in self.axes)
        seen = self.n_unique > 1 or self.diverged_trials or self._on_any_axis("diverged")
        return bool(seen or is_fed_otherwise)

    @property
    def has_latent(self) -> bool:
        """Do the bits of any two equal completions differ?"""
        more_bits = self.n_unique_bits > self.n_unique
        is_fed_otherwise = any(finding.feeds_other_bits for finding in self.axes)
        seen = more_bits or self.latent_trials or self._on_any_axis("latent")
        return bool(seen or is_fed_otherwise)

    @property
    def varies_by_chance(self) -> bool:
        """Did equal loads give different completions or bits?"""
        repeats = next((f for f in self.axes if f.axis == "run-to-run"), None)
        return repeats is not None and bool(repeats.diverged_trials or repeats.latent_trials)

    def _on_any_axis(self, kind: str) -> bool:
        return any(getattr(finding, f"{kind}_trials") for finding in self.axes)


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


@dataclass(frozen=True)
class Summary:
    """All probes and arms of a run."""

    probes: tuple[ProbeSummary, ...]
    samples: SampleColumns
    fisher_p: float | None
    """Fisher's exact test, two-sided, on diverged draws: stock against invariant."""
    references: Mapping[tuple[Arm, str], int] = field(default_factory=dict)
    """The trial that gave the reference, by arm and probe id; absent where none did."""

    @cached_property
    def arms(self) -> frozenset[Arm]:
        """Those of the probes."""
        return frozenset(probe.arm for probe in self.probes)

    @cached_property
    def probe_ids(self) -> frozenset[str]:
        return frozenset(probe.probe_id for probe in self.probes)
