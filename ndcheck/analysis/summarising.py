"""From a stream of samples to its summary."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.accumulating import Group, Groups, collect
from ndcheck.analysis.answers import Answers
from ndcheck.analysis.axes import find_axes
from ndcheck.analysis.loads import find_loads
from ndcheck.analysis.metrics import measure
from ndcheck.analysis.serving import ServingFinding
from ndcheck.analysis.statistics import (
    chao1,
    clopper_pearson,
    fisher_exact,
    good_turing_unseen_mass,
)
from ndcheck.analysis.summary import (
    AnswerFinding,
    AxisFinding,
    ControlFinding,
    Draw,
    LoadFinding,
    ProbeSummary,
    SampleColumns,
    Summary,
)
from ndcheck.analysis.tree import build_tree
from ndcheck.analysis.trials import (
    NO_TRIAL,
    Trials,
    count_bit_patterns,
    group_trials,
    joined,
    number_distinct,
    purpose_code,
    sum_parts,
)
from ndcheck.analysis.unique import Completions
from ndcheck.records import ALONE, ARMS, Arm, RunSpec, Sample


def summarise(samples: Iterable[Sample], spec: RunSpec) -> Summary:
    """Read ``samples`` in any order; `ndcheck.analysis.accumulating` says what is kept of them.

    Every probe and arm of the spec gets a summary, even if nothing of it ran.
    """
    rows, groups = collect(samples, spec)
    columns, completions = _rank(rows, list(groups.values()))
    references = {key: group.reference.trial_id for key, group in groups.items() if group.reference}
    rows, rest = rows[rows["completion"] >= 0], rows[rows["completion"] < 0]
    trials = group_trials(rows, completions, [references.get(key, NO_TRIAL) for key in groups])
    errors = rest[rest["purpose"] != purpose_code("control")]
    given = {probe.probe_id: probe.answer for probe in spec.probes}
    answers = [
        Answers.find(of_group, spec, given.get(probe_id))
        for (_, probe_id), of_group in zip(groups, completions, strict=True)
    ]
    lengths = joined([each.lengths for each in completions], np.int64)[trials.completion]
    axes = find_axes(
        trials,
        completions,
        spec.axes,
        spec.confidence,
        repeats_are_draws=spec.repeats_are_draws,
    )
    loads = find_loads(trials, errors, [group.kinds for group in groups.values()], lengths, answers)
    draws = [draw for draw, _ in axes]
    counts = _count(trials, groups, completions, draws, errors, lengths, spec)
    probes = tuple(
        _summarise_probe(key, group, completions[i], answers[i], axes[i][1], loads[i], counts, spec)
        for i, (key, group) in enumerate(groups.items())
    )
    return Summary(probes, columns, _compare_arms(probes), references)


def _rank(
    rows: NDArray[np.void], groups: Sequence[Group]
) -> tuple[SampleColumns, list[Completions]]:
    """Rank each group's completions, number the rows' by their ranks, and fill in the columns."""
    columns = SampleColumns(
        completion_id=np.full(len(rows), -1, np.int32),
        first_divergence=np.full(len(rows), -1, np.int32),
        latent_divergence=np.full(len(rows), -1, np.int32),
        margin=np.full(len(rows), np.nan, np.float32),
        max_abs_dlogprob=np.full(len(rows), np.nan, np.float32),
    )
    is_completion = rows["completion"] >= 0
    own = rows[is_completion]
    ends = np.cumsum([len(group.interner) for group in groups])
    first = np.concatenate(([0], ends)).astype(np.int64)
    number = first[own["group"]] + own["completion"]
    counts = np.bincount(number, minlength=first[-1])
    _, one_of_trial = np.unique(number_distinct(number, own["trial"]), return_index=True)
    n_trials = np.bincount(number[one_of_trial], minlength=first[-1])
    completions = [
        Completions(
            group.interner,
            counts=counts[start:end],
            n_trials=n_trials[start:end],
            first_divergences=np.array(group.first_divergences, np.int32),
            reference=group.reference,
        )
        for group, start, end in zip(groups, first[:-1].tolist(), ends.tolist(), strict=True)
    ]
    ranks = joined([each.ranks for each in completions], np.int64)[number]
    rows["completion"][is_completion] = ranks
    divergences = joined([np.array(g.first_divergences, np.int32) for g in groups], np.int32)
    first_divergences = divergences[number]
    place = own["index"]
    columns.completion_id[place] = ranks + 1
    columns.first_divergence[place] = first_divergences
    columns.latent_divergence[place] = own["latent"]
    columns.max_abs_dlogprob[place] = own["dlogprob"]
    diverged = np.flatnonzero(first_divergences >= 0)
    of_group, starts = np.unique(own["group"][diverged], return_index=True)
    for group, chosen in zip(of_group.tolist(), np.split(diverged, starts[1:]), strict=False):
        margins = completions[group].reference_margins(first_divergences[chosen])
        columns.margin[place[chosen]] = margins
    return columns, completions


@dataclass(frozen=True, slots=True)
class _Counts:
    """By group, but ``compared``, which is by trial."""

    trials: Trials
    first_trial: list[int]
    compared: NDArray[np.bool_]
    by_load: list[bool]
    n_trials: list[int]
    diverged_trials: list[int]
    latent_trials: list[int]
    n_draws: list[int]
    diverged_draws: list[int]
    latent_draws: list[int]
    unwitnessed: list[int]
    without_batch: list[int]
    """Trials of which no batch at all is known."""
    n_errors: list[int]
    n_novel: list[int]
    """Trials with a completion that no other trial had."""
    elapsed_s: list[float]
    n_generated: list[int]
    """Tokens that were generated one by one."""
    generated_s: list[float]
    n_unique_bits: list[int]
    slowdowns: dict[int, float]


def _count(
    trials: Trials,
    groups: Groups,
    completions: Sequence[Completions],
    draws: Sequence[Draw],
    errors: NDArray[np.void],
    lengths: NDArray[np.int64],
    spec: RunSpec,
) -> _Counts:
    n_groups = trials.n_groups
    has_reference = np.array([group.reference is not None for group in groups.values()], np.bool_)
    compared = ~trials.is_reference & has_reference[trials.group]
    found = compared, compared & trials.diverged, compared & trials.latent
    is_other = trials.column("load") != hash(ALONE)
    by_load = np.array([draw == "load" for draw in draws], np.bool_)
    by_load &= trials.per_group(is_other) > 0
    every = np.ones(n_groups, np.bool_)
    of_loads = trials.count_draws(every, is_other, *found[1:])
    of_trials = [trials.per_group(each & ~trials.is_confirmation) for each in found]
    n_draws, diverged_draws, latent_draws = np.where(by_load, of_loads, of_trials)
    seen_once = joined([each.n_trials for each in completions], np.int64) == 1
    novel = trials.flag(trials.of_row[seen_once[trials.completion]])
    is_generated = trials.is_decoded[trials.of_row]
    group_of_row = trials.rows["group"]
    n_generated = np.bincount(group_of_row[is_generated], lengths[is_generated], n_groups)
    witnessed = trials.is_witnessed(exactly=spec.sets_batch_size)
    first_trial = np.searchsorted(trials.group, np.arange(n_groups + 1))
    return _Counts(
        trials=trials,
        first_trial=first_trial.tolist(),
        compared=compared,
        by_load=by_load.tolist(),
        n_trials=trials.per_group(compared).tolist(),
        diverged_trials=trials.per_group(found[1]).tolist(),
        latent_trials=trials.per_group(found[2]).tolist(),
        n_draws=np.where(has_reference, n_draws, 0).tolist(),
        diverged_draws=diverged_draws.tolist(),
        latent_draws=latent_draws.tolist(),
        unwitnessed=trials.per_group(compared & ~witnessed).tolist(),
        without_batch=trials.per_group(compared & ~(trials.column("achieved") > 0)).tolist(),
        n_errors=np.bincount(errors["group"], minlength=n_groups).tolist(),
        n_novel=trials.per_group(novel).tolist(),
        elapsed_s=sum_parts(trials.elapsed_s, trials.group, n_groups),
        n_generated=n_generated.astype(np.int64).tolist(),
        generated_s=sum_parts(
            trials.elapsed_s[trials.is_decoded], trials.group[trials.is_decoded], n_groups
        ),
        n_unique_bits=count_bit_patterns(trials).tolist(),
        slowdowns=_slowdowns(trials, groups),
    )


def _summarise_probe(
    key: tuple[Arm, str],
    group: Group,
    completions: Completions,
    answers: Answers | None,
    axes: tuple[AxisFinding, ...],
    loads: tuple[LoadFinding, ...],
    counts: _Counts,
    spec: RunSpec,
) -> ProbeSummary:
    (arm, probe_id), i = key, group.number
    own = slice(counts.first_trial[i], counts.first_trial[i + 1])
    common_prefix = _common_prefix(completions)
    draw: Draw = "load" if counts.by_load[i] else "trial"
    n_draws, n_diverged = counts.n_draws[i], counts.diverged_draws[i]
    low, high = clopper_pearson(n_diverged, n_draws, spec.confidence)
    unseen_mass, n_kinds = _estimate_unseen(completions, counts.n_novel[i], own.stop - own.start)
    serving = _serving(group, spec)
    # Whom an open loop brings together is judged over all of its trials.
    is_open = serving is not None and not spec.sets_batch_size
    generated_s = counts.generated_s[i]
    return ProbeSummary(
        arm=arm,
        probe_id=probe_id,
        n_trials=counts.n_trials[i],
        n_samples=completions.n_samples,
        n_errors=counts.n_errors[i],
        first_error=group.first_error,
        n_unique=len(completions),
        modal_count=int(completions.counts[0]) if completions else 0,
        common_prefix_tokens=common_prefix,
        diverged_trials=counts.diverged_trials[i],
        latent_trials=counts.latent_trials[i],
        divergence_rate=n_diverged / n_draws if n_draws else None,
        rate_ci_low=low if n_draws else None,
        rate_ci_high=high if n_draws else None,
        confidence=spec.confidence,
        unseen_mass=unseen_mass,
        chao1=n_kinds,
        unwitnessed_trials=(counts.without_batch if is_open else counts.unwitnessed)[i],
        elapsed_s=counts.elapsed_s[i],
        tokens_per_s=counts.n_generated[i] / generated_s if generated_s else None,
        slowdown_vs_stock=counts.slowdowns.get(i),
        completions=completions,
        axes=axes,
        loads=loads,
        control=ControlFinding(
            *(len(group.controls), sum(group.controls.values())),
            *(group.controlled, group.controls_draft),
        ),
        find_tree=partial(build_tree, completions),
        measure=partial(
            measure,
            completions,
            common_prefix,
            group.logprob_sums,
            None if answers is None else answers.texts,
        ),
        draw=draw,
        n_draws=n_draws,
        diverged_draws=n_diverged,
        latent_draws=counts.latent_draws[i],
        n_unique_bits=counts.n_unique_bits[i],
        serving=serving,
        answers=(
            None if answers is None else _judge_answers(answers, completions, counts, own, draw)
        ),
    )


def _common_prefix(completions: Completions) -> int:
    """How many tokens all completions begin with."""
    if len(completions) < 2:
        return int(completions.lengths.max(initial=0))
    if completions.reference is not None:
        # All others part from the reference, and the first to do so from all of them.
        return int(np.delete(completions.first_divergences, completions.reference).min())
    tree = build_tree(completions)
    return tree.position if tree else 0


def _serving(group: Group, spec: RunSpec) -> ServingFinding | None:
    exactly = spec.sets_batch_size
    if group.serving is None or (spec.endpoint is None and exactly):
        return None
    return group.serving.finding(sets_batch_size=exactly)


def _judge_answers(
    answers: Answers, completions: Completions, counts: _Counts, own: slice, draw: Draw
) -> AnswerFinding:
    """``own`` are the trials of the group."""
    trials = counts.trials
    starts = np.append(trials.starts, len(trials.rows))
    rows = slice(starts[own.start], starts[own.stop])
    flips = answers.flips[trials.rows["completion"][rows]]
    flipped = np.unique(trials.of_row[rows][flips])
    flipped = flipped[counts.compared[flipped]]
    has_none = np.array([text is None for text in answers.texts], np.bool_)
    right = answers.is_right
    return AnswerFinding(
        answers=answers.texts,
        n_unique=len(set(answers.texts)),
        n_without=int(completions.counts[has_none].sum()),
        flipped_trials=len(flipped),
        flipped_draws=(
            len(np.unique(trials.load[flipped]))
            if draw == "load"
            else int((~trials.is_confirmation[flipped]).sum())
        ),
        n_correct=None if right is None else int(completions.counts[right].sum()),
    )


def _estimate_unseen(
    completions: Completions, n_novel: int, n_trials: int
) -> tuple[float | None, float | None]:
    """Good-Turing mass and Chao1, with trials as draws."""
    if len(completions) < 2:
        return None, None
    n_once, n_twice = (int((completions.n_trials == n).sum()) for n in (1, 2))
    return (
        good_turing_unseen_mass(n_novel, n_trials),
        chao1(len(completions), n_once, n_twice, n_trials),
    )


def _slowdowns(trials: Trials, groups: Groups) -> dict[int, float]:
    """By invariant group: the median over the loads that both arms ran of their times' ratio."""
    stock = {
        group.number: groups["stock", probe_id].number
        for (arm, probe_id), group in groups.items()
        if arm == "invariant" and ("stock", probe_id) in groups
    }
    if not stock:
        return {}
    generated = trials.is_decoded
    load, elapsed_s = trials.load[generated], trials.elapsed_s[generated]
    n_times = np.bincount(load)
    means = np.bincount(load, elapsed_s)[n_times > 0] / n_times[n_times > 0]
    names = trials.column("load")[generated]
    _, first = np.unique(load, return_index=True)
    owners = trials.group[generated][first].tolist()
    mean_s = dict(zip(zip(owners, names[first].tolist(), strict=True), means.tolist(), strict=True))
    ratios: dict[int, list[float]] = defaultdict(list)
    for (group, name), own_s in mean_s.items():
        stock_s = mean_s.get((stock.get(group, NO_TRIAL), name))
        if stock_s:
            ratios[group].append(own_s / stock_s)
    return {group: median(of_group) for group, of_group in ratios.items()}


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
