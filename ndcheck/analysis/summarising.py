"""From a stream of samples to its summary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.accumulating import Group, collect
from ndcheck.analysis.answers import Answers
from ndcheck.analysis.axes import find_axes
from ndcheck.analysis.loads import find_loads
from ndcheck.analysis.metrics import measure
from ndcheck.analysis.statistics import (
    chao1,
    clopper_pearson,
    fisher_exact,
    good_turing_unseen_mass,
)
from ndcheck.analysis.summary import (
    AnswerFinding,
    ControlFinding,
    Draw,
    ProbeSummary,
    SampleColumns,
    Summary,
)
from ndcheck.analysis.tree import build_tree
from ndcheck.analysis.trials import Trials, count_bit_patterns, group_trials, purpose_code
from ndcheck.analysis.unique import Completions
from ndcheck.records import ALONE, ARMS, Arm, RunSpec, Sample


def summarise(samples: Iterable[Sample], spec: RunSpec) -> Summary:
    """Read ``samples`` in any order; `ndcheck.analysis.accumulating` says what is kept of them.

    Every probe and arm of the spec gets a summary, even if nothing of it ran.
    """
    rows, groups = collect(samples, spec)
    columns = SampleColumns(
        completion_id=np.full(len(rows), -1, np.int32),
        first_divergence=np.full(len(rows), -1, np.int32),
        latent_divergence=np.full(len(rows), -1, np.int32),
        margin=np.full(len(rows), np.nan, np.float32),
        max_abs_dlogprob=np.full(len(rows), np.nan, np.float32),
    )
    ends = np.searchsorted(rows["group"], np.arange(1, len(groups) + 1))
    evidence = {
        key: _gather(group, own_rows, columns)
        for (key, group), own_rows in zip(groups.items(), np.split(rows, ends[:-1]), strict=True)
    }
    given_answers = {probe.probe_id: probe.answer for probe in spec.probes}
    probes = tuple(
        _summarise_probe(
            arm,
            probe_id,
            evidence[arm, probe_id],
            evidence.get(("stock", probe_id)) if arm == "invariant" else None,
            spec,
            given_answers.get(probe_id),
        )
        for arm, probe_id in evidence
    )
    references = {key: group.reference.trial_id for key, group in groups.items() if group.reference}
    return Summary(probes, columns, _compare_arms(probes), references)


@dataclass(frozen=True, slots=True)
class _Evidence:
    group: Group
    completions: Completions
    trials: Trials
    errors: NDArray[np.void]


def _gather(group: Group, rows: NDArray[np.void], columns: SampleColumns) -> _Evidence:
    """Rank a group's completions, and fill in what the columns say of its rows."""
    n_unique, n_samples = len(group.interner), int((rows["completion"] >= 0).sum())
    rows, rest = rows[:n_samples], rows[n_samples:]
    _, trial = np.unique(rows["trial"], return_inverse=True)
    seen_in_trial = np.unique(trial * n_unique + rows["completion"]) % max(1, n_unique)
    completions = Completions(
        group.interner,
        counts=np.bincount(rows["completion"], minlength=n_unique),
        n_trials=np.bincount(seen_in_trial, minlength=n_unique),
        first_divergences=np.array(group.first_divergences, np.int32),
        reference=group.reference,
    )
    rows["completion"] = completions.ranks[rows["completion"]]
    first_divergences = completions.first_divergences[rows["completion"]]
    place = rows["index"]
    columns.completion_id[place] = rows["completion"] + 1
    columns.first_divergence[place] = first_divergences
    columns.latent_divergence[place] = rows["latent"]
    columns.margin[place] = completions.reference_margins(first_divergences)
    columns.max_abs_dlogprob[place] = rows["dlogprob"]
    return _Evidence(
        group,
        completions,
        trials=group_trials(rows, completions, group.reference),
        errors=rest[rest["purpose"] != purpose_code("control")],
    )


def _summarise_probe(
    arm: Arm,
    probe_id: str,
    evidence: _Evidence,
    stock: _Evidence | None,
    spec: RunSpec,
    given_answer: str | None,
) -> ProbeSummary:
    group, completions, trials = evidence.group, evidence.completions, evidence.trials
    tree = build_tree(completions)
    common_prefix = tree.position if tree else int(completions.lengths.max(initial=0))
    draw, axes = find_axes(
        trials,
        completions,
        spec.axes,
        spec.confidence,
        repeats_are_draws=spec.repeats_are_draws,
    )
    compared = ~trials.is_reference & (group.reference is not None)
    tried, diverged, latent = map(
        np.flatnonzero, (compared, compared & trials.diverged, compared & trials.latent)
    )
    other_loads = np.flatnonzero(trials.column("load") != hash(ALONE))
    if draw == "load" and len(other_loads):
        n_draws, n_diverged, n_latent = trials.count_draws(draw, other_loads, diverged, latent)
    else:
        draw = "trial"
        is_draw = ~trials.is_confirmation
        n_draws, n_diverged, n_latent = (int(is_draw[x].sum()) for x in (tried, diverged, latent))
    if group.reference is None:
        n_draws = 0
    low, high = clopper_pearson(n_diverged, n_draws, spec.confidence)
    unseen_mass, n_kinds = _estimate_unseen(trials, completions)
    exactly = spec.sets_batch_size
    serves = spec.endpoint is not None or not exactly
    serving = group.serving.finding(sets_batch_size=exactly) if serves else None
    answers = Answers.find(completions, spec, given_answer)
    is_witnessed = trials.is_witnessed(exactly=exactly)
    if serving is not None and not exactly:
        # Whom an open loop brings together is judged over all of its trials.
        is_witnessed = trials.column("achieved") > 0
    elapsed_s = float(trials.elapsed_s.sum())
    generated_s = float(trials.elapsed_s[trials.is_decoded].sum())
    of_generated = trials.rows["completion"][trials.is_decoded[trials.of_row]]
    n_tokens = int(completions.lengths[of_generated].sum())
    return ProbeSummary(
        arm=arm,
        probe_id=probe_id,
        n_trials=len(tried),
        n_samples=completions.n_samples,
        n_errors=len(evidence.errors),
        n_unique=len(completions),
        modal_count=int(completions.counts.max(initial=0)),
        common_prefix_tokens=common_prefix,
        diverged_trials=len(diverged),
        latent_trials=len(latent),
        divergence_rate=n_diverged / n_draws if n_draws else None,
        rate_ci_low=low if n_draws else None,
        rate_ci_high=high if n_draws else None,
        confidence=spec.confidence,
        unseen_mass=unseen_mass,
        chao1=n_kinds,
        unwitnessed_trials=int((compared & ~is_witnessed).sum()),
        elapsed_s=elapsed_s,
        tokens_per_s=n_tokens / generated_s if generated_s else None,
        slowdown_vs_stock=_slowdown(trials, stock.trials) if stock else None,
        completions=completions,
        axes=axes,
        loads=find_loads(trials, completions, evidence.errors, group.kinds, answers),
        control=ControlFinding(
            *(len(group.controls), sum(group.controls.values())),
            *(group.controlled, group.controls_draft),
        ),
        tree=tree,
        metrics=measure(
            completions,
            common_prefix,
            group.logprob_sums,
            None if answers is None else answers.texts,
        ),
        draw=draw,
        n_draws=n_draws,
        diverged_draws=n_diverged,
        latent_draws=n_latent,
        n_unique_bits=count_bit_patterns(trials.rows, len(completions)),
        serving=serving,
        answers=(
            None
            if answers is None
            else _judge_answers(answers, completions, trials, compared, draw)
        ),
    )


def _judge_answers(
    answers: Answers,
    completions: Completions,
    trials: Trials,
    compared: NDArray[np.bool_],
    draw: Draw,
) -> AnswerFinding:
    flips = np.zeros(len(trials), np.bool_)
    flips[trials.of_row[answers.flips[trials.rows["completion"]]]] = True
    flipped = np.flatnonzero(flips & compared)
    is_draw = ~trials.is_confirmation
    has_none = np.array([text is None for text in answers.texts], np.bool_)
    right = answers.is_right
    return AnswerFinding(
        answers=answers.texts,
        n_unique=len(set(answers.texts)),
        n_without=int(completions.counts[has_none].sum()),
        flipped_trials=len(flipped),
        flipped_draws=(
            len(np.unique(trials.column("load")[flipped]))
            if draw == "load"
            else int(is_draw[flipped].sum())
        ),
        n_correct=None if right is None else int(completions.counts[right].sum()),
    )


def _estimate_unseen(trials: Trials, completions: Completions) -> tuple[float | None, float | None]:
    """Good-Turing mass and Chao1, with trials as draws."""
    if len(completions) < 2:
        return None, None
    seen_once = completions.n_trials == 1
    is_novel = seen_once[trials.rows["completion"]]
    n_novel = len(np.unique(trials.of_row[is_novel]))
    n_twice = int((completions.n_trials == 2).sum())
    return (
        good_turing_unseen_mass(n_novel, len(trials)),
        chao1(len(completions), int(seen_once.sum()), n_twice, len(trials)),
    )


def _slowdown(trials: Trials, stock: Trials) -> float | None:
    loads, times = _mean_times(trials)
    stock_loads, stock_times = _mean_times(stock)
    _, here, there = np.intersect1d(loads, stock_loads, return_indices=True)
    timed = stock_times[there] > 0
    ratios = times[here][timed] / stock_times[there][timed]
    return float(np.median(ratios)) if len(ratios) else None


def _mean_times(trials: Trials) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Every load that generated tokens, and its mean elapsed time in seconds."""
    generated = trials.is_decoded
    loads, of_trial = np.unique(trials.column("load")[generated], return_inverse=True)
    return loads, np.bincount(of_trial, trials.elapsed_s[generated]) / np.bincount(of_trial)


def _compare_arms(probes: tuple[ProbeSummary, ...]) -> float | None:
    """None unless both arms have draws."""
    table = [
        (sum(p.diverged_draws for p in arm), sum(p.n_draws for p in arm))
        for arm in ([p for p in probes if p.arm == name] for name in ARMS)
    ]
    (stock_diverged, n_stock), (invariant_diverged, n_invariant) = table
    if not n_stock or not n_invariant:
        return None
    return fisher_exact(stock_diverged, n_stock, invariant_diverged, n_invariant)
