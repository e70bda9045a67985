"""What each kind of load showed, compared with the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.accumulating import PURPOSES, LoadKind
from ndcheck.analysis.answers import Answers
from ndcheck.analysis.summary import LoadFinding
from ndcheck.analysis.trials import Trials
from ndcheck.analysis.unique import Completions
from ndcheck.records import CacheState

CACHE_STATES: tuple[CacheState, ...] = get_args(CacheState)


def find_loads(
    trials: Trials,
    completions: Completions,
    errors: NDArray[np.void],
    kinds: Mapping[LoadKind, int],
    answers: Answers | None = None,
) -> tuple[LoadFinding, ...]:
    """One finding for each kind of load, the reference's first; ``errors`` are OUTCOME rows."""
    return tuple(
        _judge(kind, kinds[kind], trials, completions, errors, answers)
        for kind in sorted(kinds, key=_place)
        if kind.purpose != "control"
    )


def _place(kind: LoadKind) -> tuple[int, ...]:
    slot = -1 if kind.slot is None else kind.slot
    state = CACHE_STATES.index(kind.cache_state)
    wide = kind.scores, kind.drafts, kind.width
    return PURPOSES.index(kind.purpose), kind.batch_size, slot, state, *wide


def _judge(
    kind: LoadKind,
    number: int,
    trials: Trials,
    completions: Completions,
    errors: NDArray[np.void],
    answers: Answers | None,
) -> LoadFinding:
    rows = trials.rows[trials.rows["kind"] == number]
    chosen = trials.column("kind") == number
    divergences = trials.divergence[chosen & trials.diverged]
    achieved = rows["achieved"][rows["achieved"] >= 0]
    elapsed_s = float(trials.elapsed_s[chosen].sum())
    n_tokens = int(completions.lengths[rows["completion"]].sum())
    is_decoded = kind.width == 1 and not kind.scores
    failed = errors[errors["kind"] == number]
    latent = chosen & trials.latent
    latent_at = rows["latent"][np.isin(rows["trial"], trials.ids[latent]) & (rows["latent"] >= 0)]
    return LoadFinding(
        *kind,
        n_trials=int(chosen.sum()),
        n_samples=len(rows),
        n_errors=len(failed),
        n_unique=len(np.unique(rows["completion"])),
        n_diverged_trials=len(divergences),
        first_divergence_min=int(divergences.min()) if len(divergences) else None,
        first_divergence_median=float(np.median(divergences)) if len(divergences) else None,
        latent=int(latent.sum()),
        achieved_batch_size_min=int(achieved.min()) if len(achieved) else None,
        elapsed_s=elapsed_s,
        tokens_per_s=n_tokens / elapsed_s if elapsed_s and is_decoded else None,
        first_latent_min=int(latent_at.min()) if len(latent_at) else None,
        answer_flips=None if answers is None else answers.count_flips(rows),
        n_correct=None if answers is None else answers.count_right(rows),
        trial_ids=tuple(np.union1d(trials.ids[chosen], failed["trial"]).tolist()),
    )
