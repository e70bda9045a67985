"""The invariance properties: each trial against the baseline that differs along its axis only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

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
    completions: Sequence[Completions],
    asked: tuple[Axis, ...],
    confidence: float,
    *,
    repeats_are_draws: bool,
) -> list[tuple[Draw, tuple[AxisFinding, ...]]]:
    """By group: what a draw is, and a finding for each axis that was asked for or has evidence.

    A row is compared with the baseline's row in the same slot; where the two trials share no slot
    (axis ``slot``), their first rows are compared. Where the baseline's load ran several times, its
    commonest completion is the baseline. A trial without a baseline counts nowhere. Every trial
    with several rows is evidence on ``slot`` besides: its rows against its first. Every load that
    ran more than once is evidence on ``run-to-run``: each of its trials against the commonest
    completion among them.

    A draw is a trial if ``repeats_are_draws``, or where some load did not repeat itself; else a
    load. Along ``run-to-run`` it is always a trial.
    """
    judge = partial(_judge_axis, trials, completions, confidence)
    all_repeats = judge("run-to-run", np.zeros(trials.n_groups, np.bool_))
    by_load = np.array(
        [not repeats_are_draws and _agrees(found) for found in all_repeats], np.bool_
    )
    findings = []
    for is_load, repeats, *others in zip(
        by_load.tolist(), all_repeats, *(judge(axis, by_load) for axis in AXES[1:]), strict=True
    ):
        found = (repeats, *(_tell_apart(finding, repeats, confidence) for finding in others))
        draw: Draw = "load" if is_load else "trial"
        findings.append((draw, tuple(f for f in found if f.n_trials or f.axis in asked)))
    return findings


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


def _judge_axis(
    trials: Trials,
    completions: Sequence[Completions],
    confidence: float,
    axis: Axis,
    by_load: NDArray[np.bool_],
) -> list[AxisFinding]:
    """One finding for each group; ``by_load`` says of each whether a draw is a load."""
    rows, partners = (
        _pair_repeats(trials) if axis == "run-to-run" else _pair_with_baselines(trials, axis)
    )
    if axis == "slot":
        own_rows, own_partners = _pair_within_trials(trials)
        rows = np.concatenate((rows, own_rows))
        partners = np.concatenate((partners, own_partners))
    if axis not in LEAST_FED:
        return _judge(axis, trials, completions, (rows, partners), confidence, by_load)
    # A completion that is too short shows nothing.
    is_fed = trials.rows["fed_tokens"][rows] >= LEAST_FED[axis]
    is_drafted = trials.rows["draft_passes"][rows] > 0
    pairs = rows[is_fed | is_drafted], partners[is_fed | is_drafted]
    findings = _judge(axis, trials, completions, pairs, confidence, by_load)
    count = partial(count_fed, with_classes=axis == "width")
    no_tokens = cache(partial(replace, tokens=count(trials.rows[:0])))
    if not len(pairs[0]):
        return [no_tokens(finding) for finding in findings]
    fed, drafted, verified = rows[is_fed], rows[is_drafted], partners[is_drafted]
    return [
        replace(
            finding,
            tokens=count(trials.rows[fed[own]]),
            drafted=_count_drafted(trials, drafted[of_draft], verified[of_draft]),
        )
        for finding, own, of_draft in zip(
            findings, _by_group(trials, fed), _by_group(trials, drafted), strict=True
        )
    ]


def _by_group(trials: Trials, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Which of these rows are each group's, in their order."""
    group = trials.rows["group"][rows]
    order = np.argsort(group, kind="stable")
    return np.split(order, np.searchsorted(group[order], np.arange(1, trials.n_groups)))


def _count_drafted(
    trials: Trials, rows: NDArray[np.int64], partners: NDArray[np.int64]
) -> DraftFinding | None:
    """Of one group; None where nothing was drafted."""
    if not len(rows):
        return None
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
    completion = trials.completion
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
    baselines = trials.find(trials.rows["group"][rows], trials.rows["baseline"][rows])
    rows, baselines = rows[baselines >= 0], baselines[baselines >= 0]

    # Rows are in order of trial and slot, and so are these keys.
    n_slots = int(trials.rows["slot"].max(initial=0)) + 1
    keys = trials.of_row * n_slots + trials.rows["slot"]
    wanted = baselines * n_slots + trials.rows["slot"][rows]
    same_slot = np.isin(wanted, keys)

    shares_slot = trials.flag(trials.of_row[rows[same_slot]])[trials.of_row[rows]]
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
    completions: Sequence[Completions],
    pairs: Pairs,
    confidence: float,
    by_load: NDArray[np.bool_],
) -> list[AxisFinding]:
    rows, partners = pairs
    of_pair = trials.of_row[rows]
    diverges, differs = _compare(trials, rows, partners)
    differs &= ~diverges

    tried, diverged, latent = map(trials.flag, (of_pair, of_pair[diverges], of_pair[differs]))
    latent &= ~diverged
    drawn = tried
    if axis == "run-to-run":
        # Loads that ran again because they had diverged would make the rate too high.
        drawn = trials.is_planned_repeat
    draws = trials.count_draws(by_load, drawn, diverged & drawn, latent & drawn)
    n_tried, n_diverged, n_latent = map(trials.per_group, (tried, diverged, latent))
    is_alone = trials.column("batch_size") == 1
    alone = [trials.per_group(is_alone & each) for each in (tried, diverged, latent)]
    of_axis = np.where(n_diverged[trials.group] > 0, diverged, latent)
    nothing = np.zeros(len(trials), np.bool_)
    all_loads = np.ones(trials.n_groups, np.bool_)
    confirmed, _, _ = trials.count_draws(all_loads, of_axis & trials.is_repeated, nothing, nothing)
    first_divergence = _first_divergences(trials, completions, rows[diverges], partners[diverges])
    first_latent = _first_latents(trials, rows[differs], partners[differs], latent)
    sizes_diverged, sizes_latent = _batch_sizes(trials, diverged), _batch_sizes(trials, latent)
    nothing_found = cache(partial(_nothing_found, axis))
    findings = []
    for group, (is_load, n_trials, n, k, n_bits, *counts) in enumerate(
        np.stack((by_load, n_tried, *draws, n_diverged, n_latent, confirmed, *alone), 1).tolist()
    ):
        draw: Draw = "load" if is_load else "trial"
        if not n_trials and not n:
            findings.append(nothing_found(draw))
            continue
        low, high = clopper_pearson(k, n, confidence)
        findings.append(
            AxisFinding(
                axis=axis,
                n_trials=n_trials,
                diverged_trials=counts[0],
                latent_trials=counts[1],
                rate=k / n if n else None,
                rate_ci_low=low if n else None,
                rate_ci_high=high if n else None,
                first_divergence_min=first_divergence.get(group),
                batch_sizes_diverged=sizes_diverged.get(group, ()),
                draw=draw,
                n_draws=n,
                diverged_draws=k,
                latent_draws=n_bits,
                n_confirmed=counts[2],
                told_apart=None,
                first_latent_min=first_latent.get(group),
                batch_sizes_latent=sizes_latent.get(group, ()),
                alone=Counts(*counts[3:]),
            )
        )
    return findings


def _nothing_found(axis: Axis, draw: Draw) -> AxisFinding:
    """Of an axis that no trial of a group compares."""
    return AxisFinding(
        axis=axis,
        n_trials=0,
        diverged_trials=0,
        latent_trials=0,
        rate=None,
        rate_ci_low=None,
        rate_ci_high=None,
        first_divergence_min=None,
        batch_sizes_diverged=(),
        draw=draw,
        n_draws=0,
        diverged_draws=0,
        latent_draws=0,
        n_confirmed=0,
        told_apart=None,
        first_latent_min=None,
        batch_sizes_latent=(),
    )


def _first_divergences(
    trials: Trials,
    completions: Sequence[Completions],
    rows: NDArray[np.int64],
    partners: NDArray[np.int64],
) -> dict[int, int]:
    """By group, the first token at which any of these rows differs from its partner."""
    group = trials.rows["group"][rows]
    parted = {
        *zip(
            *(
                x.tolist()
                for x in (
                    group,
                    trials.rows["completion"][rows],
                    trials.rows["completion"][partners],
                )
            ),
            strict=True,
        )
    }
    found: dict[int, int] = {}
    for group, here, there in parted:
        at = completions[group].parting(here, there)
        if at is not None:
            found[group] = min(at, found.get(group, at))
    return found


def _first_latents(
    trials: Trials,
    rows: NDArray[np.int64],
    partners: NDArray[np.int64],
    latent: NDArray[np.bool_],
) -> dict[int, int]:
    """By group, the first token at which any of these rows of ``latent`` trials has other bits."""
    # Both against the reference: where they leave it at two positions, the earlier one parts them.
    here, there = (trials.rows["latent"][side] for side in (rows, partners))
    ends = np.iinfo(here.dtype).max
    here, there = (np.where(at < 0, ends, at) for at in (here, there))
    is_known = (here != there) & latent[trials.of_row[rows]]
    earlier = np.minimum(here, there)[is_known].tolist()
    found: dict[int, int] = {}
    for group, at in zip(trials.rows["group"][rows][is_known].tolist(), earlier, strict=True):
        found[group] = min(at, found.get(group, at))
    return found


def _batch_sizes(trials: Trials, chosen: NDArray[np.bool_]) -> dict[int, tuple[int, ...]]:
    """By group, the batch sizes of these trials, ascending."""
    sizes = trials.column("batch_size")[chosen].tolist()
    found: dict[int, set[int]] = defaultdict(set)
    for group, size in zip(trials.group[chosen].tolist(), sizes, strict=True):
        found[group].add(size)
    return {group: tuple(sorted(of_group)) for group, of_group in found.items()}
