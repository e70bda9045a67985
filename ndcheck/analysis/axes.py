"""The invariance properties: each trial against the baseline that differs along its axis only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.divergence import first_divergence
from ndcheck.analysis.statistics import clopper_pearson
from ndcheck.analysis.summary import AxisFinding
from ndcheck.analysis.trials import Trials, axis_code
from ndcheck.analysis.unique import Completions
from ndcheck.records import AXES, Axis

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Indices into a group's rows: those of the trial, and what each is compared with."""


def find_axes(
    trials: Trials, completions: Completions, asked: tuple[Axis, ...], confidence: float
) -> tuple[AxisFinding, ...]:
    """One finding for each axis that was asked for or has evidence.

    A row is compared with the baseline's row in the same slot; where the two trials share no slot
    (axis ``slot``), their first rows are compared. A trial without a baseline counts nowhere.
    Every trial with several rows is evidence on ``slot`` besides: its rows against its first.
    """
    return tuple(_find_axes(trials, completions, asked, confidence))


def _find_axes(
    trials: Trials, completions: Completions, asked: tuple[Axis, ...], confidence: float
) -> Iterator[AxisFinding]:
    for axis in AXES:
        rows, partners = _pair_with_baselines(trials, axis)
        if axis == "slot":
            own_rows, own_partners = _pair_within_trials(trials)
            rows = np.concatenate((rows, own_rows))
            partners = np.concatenate((partners, own_partners))
        if len(rows) or axis in asked:
            yield _judge(axis, trials, completions, (rows, partners), confidence)


def _pair_with_baselines(trials: Trials, axis: Axis) -> Pairs:
    rows = np.flatnonzero(trials.rows["axis"] == axis_code(axis))
    rows = rows[np.isin(trials.rows["baseline"][rows], trials.ids)]
    baselines = np.searchsorted(trials.ids, trials.rows["baseline"][rows])

    # Rows are in order of trial and slot, and so are these keys.
    n_slots = int(trials.rows["slot"].max(initial=0)) + 1
    keys = trials.of_row * n_slots + trials.rows["slot"]
    wanted = baselines * n_slots + trials.rows["slot"][rows]
    same_slot = np.isin(wanted, keys)

    shares_slot = np.isin(trials.of_row[rows], trials.of_row[rows[same_slot]])
    first_only = ~shares_slot & (trials.starts[trials.of_row[rows]] == rows)
    return (
        np.concatenate((rows[same_slot], rows[first_only])),
        np.concatenate(
            (np.searchsorted(keys, wanted[same_slot]), trials.starts[baselines[first_only]])
        ),
    )


def _pair_within_trials(trials: Trials) -> Pairs:
    first = trials.starts[trials.of_row]
    rows = np.flatnonzero(np.arange(len(trials.rows)) != first)
    return rows, first[rows]


def _judge(
    axis: Axis, trials: Trials, completions: Completions, pairs: Pairs, confidence: float
) -> AxisFinding:
    rows, partners = pairs
    of_pair = trials.of_row[rows]
    completion = trials.rows["completion"]
    diverges = completion[rows] != completion[partners]
    # Equal fingerprints of all bits settle it; 0 means not recorded, which is no evidence.
    differs = np.zeros(len(rows), np.bool_)
    for bits in (trials.rows["logprobs"], trials.rows["row_digests"]):
        here, there = bits[rows], bits[partners]
        differs |= (here != there) & (here != 0) & (there != 0)

    n_trials = len(np.unique(of_pair))
    diverged = np.unique(of_pair[diverges])
    latent = np.setdiff1d(of_pair[differs & ~diverges], diverged)
    low, high = clopper_pearson(len(diverged), n_trials, confidence)
    n_unique = max(1, len(completions))
    parted = np.unique(
        completion[rows[diverges]].astype(np.int64) * n_unique + completion[partners[diverges]]
    )
    positions = (
        first_divergence(completions.token_ids(i), completions.token_ids(j))
        for i, j in zip(parted // n_unique, parted % n_unique, strict=True)
    )
    return AxisFinding(
        axis=axis,
        n_trials=n_trials,
        diverged_trials=len(diverged),
        latent_trials=len(latent),
        rate=len(diverged) / n_trials if n_trials else None,
        rate_ci_low=low if n_trials else None,
        rate_ci_high=high if n_trials else None,
        first_divergence_min=min((at for at in positions if at is not None), default=None),
        batch_sizes_diverged=tuple(np.unique(trials.column("batch_size")[diverged]).tolist()),
    )
