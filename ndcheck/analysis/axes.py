"""The invariance properties: each trial against the baseline that differs along its axis only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.divergence import first_divergence
from ndcheck.analysis.feeding import count_fed
from ndcheck.analysis.statistics import clopper_pearson, fisher_exact
from ndcheck.analysis.summary import AxisFinding, Counts, DraftFinding, Draw
from ndcheck.analysis.trials import Trials, purpose_code
from ndcheck.analysis.unique import Completions
from ndcheck.records import AXES, Axis

LEAST_FED: dict[Axis, int] = {"width": 3, "scoring": 2}
"""Tokens of a completion from which on a pass can be wider than one of decoding."""
Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Indices into a group's rows: those of the trial, and what each is compared with."""


def find_axes(
    trials: Trials,
    completions: Completions,
    asked: tuple[Axis, ...],
    confidence: float,
    *,
    repeats_are_draws: bool,
) -> tuple[Draw, tuple[AxisFinding, ...]]:
    """What a draw is, and one finding for each axis that was asked for or has evidence.

    A row is compared with the baseline's row in the same slot; where the two trials share no slot
    (axis ``slot``), their first rows are compared. Where the baseline's load ran several times, its
    commonest completion is the baseline. A trial without a baseline counts nowhere. Every trial
    with several rows is evidence on ``slot`` besides: its rows against its first. Every load that
    ran more than once is evidence on ``run-to-run``: each of its trials against the commonest
    completion among them.

    A draw is a trial if ``repeats_are_draws``, or where some load did not repeat itself; else a
    load. Along ``run-to-run`` it is always a trial.
    """
    (repeats,) = _judge_axes(("run-to-run",), trials, completions, confidence, "trial")
    draw: Draw = "trial" if repeats_are_draws or not _agrees(repeats) else "load"
    others = _judge_axes(AXES[1:], trials, completions, confidence, draw)
    findings = (repeats, *(_tell_apart(finding, repeats, confidence) for finding in others))
    return draw, tuple(found for found in findings if found.n_trials or found.axis in asked)


def _agrees(repeats: AxisFinding) -> bool:
    return not repeats.diverged_trials and not repeats.latent_trials


def _tell_apart(finding: AxisFinding, repeats: AxisFinding, confidence: float) -> AxisFinding:
    """With ``told_apart``: can the divergences along the axis be anything but chance?

    Where loads repeat themselves, and one that diverged did so again, they are the axis's. So they
    are where Fisher's exact test tells their rate from that of repeats. Where repeats of equal
    loads differ too, the test is made of the probe alone, if its repeats agree: chance may need a
    batch. Else nothing is laid to another axis.
    """
    if not finding.diverged_trials and not finding.latent_trials:
        return finding
    if not repeats.diverged_trials and (finding.diverged_trials or not repeats.latent_trials):
        here, there = finding.all_trials, repeats.all_trials
        if finding.n_confirmed or _p_value(here, there) < 1 - confidence:
            return replace(finding, told_apart=True)
    told_apart = (
        not repeats.alone.diverged_trials
        and _p_value(finding.alone, repeats.alone) < 1 - confidence
    )
    # What may be chance has no rate along the axis.
    return replace(finding, told_apart=told_apart, rate=None, rate_ci_low=None, rate_ci_high=None)


def _p_value(tried: Counts, repeated: Counts) -> float:
    """That trials differ as often as repeats, of which none diverged in tokens."""
    # Bits count as well where repeats agree in them.
    n_differing = tried.diverged_trials + (0 if repeated.latent_trials else tried.latent_trials)
    return fisher_exact(n_differing, tried.n_trials, 0, repeated.n_trials)


def _judge_axes(
    axes: tuple[Axis, ...],
    trials: Trials,
    completions: Completions,
    confidence: float,
    draw: Draw,
) -> Iterator[AxisFinding]:
    for axis in axes:
        rows, partners = (
            _pair_repeats(trials) if axis == "run-to-run" else _pair_with_baselines(trials, axis)
        )
        if axis == "slot":
            own_rows, own_partners = _pair_within_trials(trials)
            rows = np.concatenate((rows, own_rows))
            partners = np.concatenate((partners, own_partners))
        tokens = drafted = None
        if axis in LEAST_FED:
            # A completion that is too short shows nothing.
            is_fed = trials.rows["fed_tokens"][rows] >= LEAST_FED[axis]
            is_drafted = trials.rows["draft_passes"][rows] > 0
            tokens = count_fed(trials.rows[rows[is_fed]], with_classes=axis == "width")
            if is_drafted.any():
                drafted = _count_drafted(trials, rows[is_drafted], partners[is_drafted])
            is_either = is_fed | is_drafted
            rows, partners = rows[is_either], partners[is_either]
        finding = _judge(axis, trials, completions, (rows, partners), confidence, draw)
        yield replace(finding, tokens=tokens, drafted=drafted)


def _count_drafted(
    trials: Trials, rows: NDArray[np.int64], partners: NDArray[np.int64]
) -> DraftFinding:
    diverges, differs = _compare(trials, rows, partners)
    widths = trials.rows["width"][rows]
    # All rows of a trial have the same passes.
    _, first = np.unique(trials.of_row[rows], return_index=True)
    n_passes, n_proposed, n_accepted = (
        int(trials.rows[name][rows[first]].sum())
        for name in ("draft_passes", "proposed", "accepted")
    )
    diverged = np.unique(widths[diverges])
    latent = np.setdiff1d(widths[differs], diverged)
    return DraftFinding(
        *(len(first), n_passes, n_proposed, n_accepted),
        *(tuple(diverged.tolist()), tuple(latent.tolist())),
    )


def _compare(
    trials: Trials, rows: NDArray[np.int64], partners: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of each pair: are the completions others, and are the bits?"""
    completion = trials.rows["completion"]
    # Equal fingerprints of all bits settle it; 0 means not recorded, which is no evidence.
    differs = np.zeros(len(rows), np.bool_)
    for bits in (trials.rows["logprobs"], trials.rows["row_digests"]):
        here, there = bits[rows], bits[partners]
        differs |= (here != there) & (here != 0) & (there != 0)
    return completion[rows] != completion[partners], differs


def _pair_repeats(trials: Trials) -> Pairs:
    rows = np.flatnonzero(trials.is_repeated[trials.of_row])
    return rows, trials.commonest[rows]


def _pair_with_baselines(trials: Trials, axis: Axis) -> Pairs:
    is_of_axis = trials.rows["purpose"] == purpose_code(axis)
    if axis == "batch-size":
        # Batches that only served as baselines: runs before version 0.2 did not ask them.
        is_of_axis |= trials.rows["purpose"] == purpose_code("reference")
    rows = np.flatnonzero(is_of_axis)
    rows = rows[np.isin(trials.rows["baseline"][rows], trials.ids)]
    baselines = np.searchsorted(trials.ids, trials.rows["baseline"][rows])

    # Rows are in order of trial and slot, and so are these keys.
    n_slots = int(trials.rows["slot"].max(initial=0)) + 1
    keys = trials.of_row * n_slots + trials.rows["slot"]
    wanted = baselines * n_slots + trials.rows["slot"][rows]
    same_slot = np.isin(wanted, keys)

    shares_slot = np.isin(trials.of_row[rows], trials.of_row[rows[same_slot]])
    first_only = ~shares_slot & (trials.starts[trials.of_row[rows]] == rows)
    partners = np.concatenate(
        (np.searchsorted(keys, wanted[same_slot]), trials.starts[baselines[first_only]])
    )
    return np.concatenate((rows[same_slot], rows[first_only])), trials.commonest[partners]


def _pair_within_trials(trials: Trials) -> Pairs:
    first = trials.starts[trials.of_row]
    rows = np.flatnonzero(np.arange(len(trials.rows)) != first)
    return rows, first[rows]


def _judge(
    axis: Axis,
    trials: Trials,
    completions: Completions,
    pairs: Pairs,
    confidence: float,
    draw: Draw,
) -> AxisFinding:
    rows, partners = pairs
    of_pair = trials.of_row[rows]
    completion = trials.rows["completion"]
    diverges, differs = _compare(trials, rows, partners)
    tried = np.unique(of_pair)
    diverged = np.unique(of_pair[diverges])
    latent = np.setdiff1d(of_pair[differs & ~diverges], diverged)
    drawn = tried
    if axis == "run-to-run":
        # Loads that ran again because they had diverged would make the rate too high.
        drawn = np.flatnonzero(trials.is_planned_repeat)
    n, k, n_latent = trials.count_draws(
        draw, drawn, np.intersect1d(diverged, drawn), np.intersect1d(latent, drawn)
    )
    low, high = clopper_pearson(k, n, confidence)
    n_unique = max(1, len(completions))
    parted = np.unique(
        completion[rows[diverges]].astype(np.int64) * n_unique + completion[partners[diverges]]
    )
    positions = (
        first_divergence(completions.token_ids(i), completions.token_ids(j))
        for i, j in zip(parted // n_unique, parted % n_unique, strict=True)
    )
    # Both against the reference: where they leave it at two positions, the earlier one parts them.
    here, there = (trials.rows["latent"][side[differs & ~diverges]] for side in (rows, partners))
    ends = np.iinfo(here.dtype).max
    here, there = (np.where(at < 0, ends, at) for at in (here, there))
    is_known = (here != there) & np.isin(of_pair[differs & ~diverges], latent)
    found = diverged if len(diverged) else latent
    is_alone = trials.column("batch_size") == 1
    return AxisFinding(
        axis=axis,
        n_trials=len(tried),
        diverged_trials=len(diverged),
        latent_trials=len(latent),
        rate=k / n if n else None,
        rate_ci_low=low if n else None,
        rate_ci_high=high if n else None,
        first_divergence_min=min((at for at in positions if at is not None), default=None),
        batch_sizes_diverged=tuple(np.unique(trials.column("batch_size")[diverged]).tolist()),
        draw=draw,
        n_draws=n,
        diverged_draws=k,
        latent_draws=n_latent,
        n_confirmed=len(np.unique(trials.column("load")[found[trials.is_repeated[found]]])),
        told_apart=None,
        first_latent_min=min(np.minimum(here, there)[is_known].tolist(), default=None),
        batch_sizes_latent=tuple(np.unique(trials.column("batch_size")[latent]).tolist()),
        alone=Counts(*(int(is_alone[found].sum()) for found in (tried, diverged, latent))),
    )
