"""What each kind of load showed, compared with the reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import median
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.accumulating import PURPOSES, LoadKind
from ndcheck.analysis.answers import Answers
from ndcheck.analysis.summary import LoadFinding
from ndcheck.analysis.trials import Trials, number_distinct, sum_parts
from ndcheck.records import CacheState

CACHE_STATES: tuple[CacheState, ...] = get_args(CacheState)
NONE = np.iinfo(np.int64).max


def find_loads(
    trials: Trials,
    errors: NDArray[np.void],
    kinds: Sequence[Mapping[LoadKind, int]],
    lengths: NDArray[np.int64],
    answers: Sequence[Answers | None],
) -> list[tuple[LoadFinding, ...]]:
    """By group, one finding for each kind of load, the reference's first.

    ``errors`` are OUTCOME rows; ``lengths`` are the tokens of each row's completion.
    """
    table = _tabulate(trials, errors, kinds, lengths, with_rows=any(answers))
    return [
        tuple(
            table.finding(kind, number, answers[group])
            for kind in sorted(of_group, key=_place)
            if kind.purpose != "control"
            for number in (table.first_kind[group] + of_group[kind],)
        )
        for group, of_group in enumerate(kinds)
    ]


@lru_cache(1024)
def _place(kind: LoadKind) -> tuple[int, ...]:
    slot = -1 if kind.slot is None else kind.slot
    state = CACHE_STATES.index(kind.cache_state)
    wide = kind.scores, kind.drafts, kind.width
    return PURPOSES.index(kind.purpose), kind.batch_size, slot, state, *wide


@dataclass(frozen=True, slots=True)
class _Kinds:
    """What all kinds of load showed, numbered over all groups, those of a group end to end."""

    first_kind: list[int]
    n_unique: list[int]
    n_tokens: list[int]
    latent: list[int]
    first_latent: list[int]
    achieved_min: list[int]
    elapsed_s: list[float]
    trial_ids: list[list[int]]
    failed: Mapping[int, list[int]]
    """Trial ids of samples with an error, by kind."""
    divergences: Mapping[int, list[int]]
    """Of the trials that diverged, by kind."""
    n_samples: list[int]
    rows: Sequence[NDArray[np.void]]
    """Only where answers are asked for."""

    def finding(self, kind: LoadKind, number: int, answers: Answers | None) -> LoadFinding:
        elapsed_s = self.elapsed_s[number]
        divergences, failed = self.divergences.get(number, ()), self.failed.get(number, ())
        trial_ids = self.trial_ids[number]
        is_decoded = kind.width == 1 and not kind.scores
        return LoadFinding(
            *kind,
            n_trials=len(trial_ids),
            n_samples=self.n_samples[number],
            n_errors=len(failed),
            n_unique=self.n_unique[number],
            n_diverged_trials=len(divergences),
            first_divergence_min=min(divergences, default=None),
            first_divergence_median=float(median(divergences)) if divergences else None,
            latent=self.latent[number],
            achieved_batch_size_min=_known(self.achieved_min[number]),
            elapsed_s=elapsed_s,
            tokens_per_s=self.n_tokens[number] / elapsed_s if elapsed_s and is_decoded else None,
            first_latent_min=_known(self.first_latent[number]),
            answer_flips=None if answers is None else answers.count_flips(self.rows[number]),
            n_correct=None if answers is None else answers.count_right(self.rows[number]),
            trial_ids=tuple(sorted({*trial_ids, *failed}) if failed else trial_ids),
        )


def _tabulate(
    trials: Trials,
    errors: NDArray[np.void],
    kinds: Sequence[Mapping[LoadKind, int]],
    lengths: NDArray[np.int64],
    *,
    with_rows: bool,
) -> _Kinds:
    first_kind = np.concatenate(([0], np.cumsum([len(of_group) for of_group in kinds])))
    n_kinds = int(first_kind[-1])

    def number(rows: NDArray[np.void]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = first_kind[rows["group"]] + rows["kind"]
        return found

    def least(values: NDArray[np.int32], of_kind: NDArray[np.int64]) -> list[int]:
        found = np.full(n_kinds, NONE)
        np.minimum.at(found, of_kind, values)
        return found.tolist()

    of_row = number(trials.rows)
    of_trial = of_row[trials.starts]
    _, first = np.unique(number_distinct(of_row, trials.completion), return_index=True)
    shows_bits = (trials.rows["latent"] >= 0) & trials.latent[trials.of_row]
    is_witnessed = trials.rows["achieved"] >= 0
    in_order = np.argsort(of_trial, kind="stable")
    ends = np.searchsorted(of_trial[in_order], np.arange(n_kinds + 1)).tolist()
    ids = trials.ids[in_order].tolist()
    rows: Sequence[NDArray[np.void]] = ()
    if with_rows:
        rows_in_order = np.argsort(of_row, kind="stable")
        row_ends = np.searchsorted(of_row[rows_in_order], np.arange(1, n_kinds))
        rows = np.split(trials.rows[rows_in_order], row_ends)[:n_kinds]
    return _Kinds(
        first_kind=first_kind.tolist(),
        n_unique=np.bincount(of_row[first], minlength=n_kinds).tolist(),
        n_tokens=np.bincount(of_row, lengths, n_kinds).astype(np.int64).tolist(),
        latent=np.bincount(of_trial[trials.latent], minlength=n_kinds).tolist(),
        first_latent=least(trials.rows["latent"][shows_bits], of_row[shows_bits]),
        achieved_min=least(trials.rows["achieved"][is_witnessed], of_row[is_witnessed]),
        elapsed_s=sum_parts(trials.elapsed_s[in_order], of_trial[in_order], n_kinds),
        trial_ids=[ids[start:end] for start, end in pairwise(ends)],
        failed=_by_kind(number(errors), errors["trial"]),
        divergences=_by_kind(of_trial[trials.diverged], trials.divergence[trials.diverged]),
        n_samples=np.bincount(of_row, minlength=n_kinds).tolist(),
        rows=rows,
    )


def _by_kind(kinds: NDArray[np.int64], values: NDArray[Any]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for kind, value in zip(kinds.tolist(), values.tolist(), strict=True):
        found[kind].append(value)
    return found


def _known(least: int) -> int | None:
    return None if least == NONE else least
