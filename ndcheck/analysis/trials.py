"""The trials of all probes and arms, and how each compares with its reference.

A run has thousands of groups (a probe in an arm) of a few rows, so what can be found of all groups
at once is: an operation of numpy costs the same for one group as for a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.accumulating import PURPOSES
from ndcheck.analysis.statistics import is_settled
from ndcheck.analysis.unique import Completions
from ndcheck.records import Axis, Purpose

NO_DIVERGENCE = np.iinfo(np.int32).max
NO_TRIAL = -1
N_ADDED_IN_PAIRS = 8
VARIED_AXES: tuple[Axis, ...] = ("slot", "neighbours", "cache", "width", "scoring")
"""Those whose trials are no baselines, so that only `plan_confirmations` repeats them."""


@dataclass(frozen=True, eq=False)
class Trials:
    """``rows`` are OUTCOME rows by group, trial and slot, none with an error; the rest is by trial.

    Trial i has the rows ``starts[i]`` to ``starts[i + 1]``. ``completion`` numbers each row's
    completion over all groups: those of group g from ``first_completion[g]`` on, by their index.
    ``load`` numbers distinct loads of a group over all groups, ``group_of_load`` is whose each is.
    ``divergence`` is the first token at which any of a trial's rows differs from the reference,
    NO_DIVERGENCE where none does. ``latent``: the tokens are the reference's, the bits are not.
    ``commonest`` gives for each row the one that stands for its load and slot, and ``is_reference``
    is the trial that gave the reference.
    """

    rows: NDArray[np.void]
    completion: NDArray[np.int64]
    first_completion: NDArray[np.int64]
    of_row: NDArray[np.int64]
    group: NDArray[np.int64]
    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    load: NDArray[np.int64]
    group_of_load: NDArray[np.int64]
    divergence: NDArray[np.int32]
    latent: NDArray[np.bool_]
    elapsed_s: NDArray[np.float64]
    commonest: NDArray[np.int64]
    is_reference: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_groups(self) -> int:
        return len(self.first_completion) - 1

    def column(self, name: str) -> NDArray[Any]:
        """A column that all rows of a trial share, one value per trial."""
        return self.rows[name][self.starts]

    def flag(self, trials: NDArray[np.int64]) -> NDArray[np.bool_]:
        """True for each of these trials."""
        return _flag(trials, len(self))

    def per_group(self, trials: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of the trials that are True each group has."""
        return np.bincount(self.group[trials], minlength=self.n_groups)

    @cached_property
    def diverged(self) -> NDArray[np.bool_]:
        return self.divergence < NO_DIVERGENCE

    @cached_property
    def is_decoded(self) -> NDArray[np.bool_]:
        """Were all of its tokens generated one by one?"""
        is_decoded: NDArray[np.bool_] = (self.column("width") == 1) & (
            self.column("fed_tokens") == 0
        )
        return is_decoded

    @cached_property
    def is_repeated(self) -> NDArray[np.bool_]:
        """Did the trial's load run more than once?"""
        return _sizes(self.load) > 1

    @cached_property
    def is_confirmation(self) -> NDArray[np.bool_]:
        """Was it run only because its load had diverged? Such a trial is no draw of any rate."""
        purpose = self.column("purpose")
        baseline = self.find(self.group, self.column("baseline"))
        of_varied = np.isin(purpose[baseline], [purpose_code(a) for a in VARIED_AXES])
        is_confirmation: NDArray[np.bool_] = (
            of_varied & (baseline >= 0) & (purpose == purpose_code("run-to-run"))
        )
        return is_confirmation

    @cached_property
    def is_planned_repeat(self) -> NDArray[np.bool_]:
        """Did its load run more than once by plan, whatever came of it?"""
        planned = np.flatnonzero(~self.is_confirmation)
        found = np.zeros(len(self), np.bool_)
        found[planned] = _sizes(self.load[planned]) > 1
        return found

    def find(self, groups: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of the trials with these ids in these groups; -1 where there is none."""
        if not len(self):
            return np.full(len(ids), -1)
        known = np.unique(self.ids)
        keys = self.group * len(known) + np.searchsorted(known, self.ids)
        place = np.searchsorted(known, ids).clip(max=len(known) - 1)
        wanted = groups * len(known) + place
        found = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        return np.where((known[place] == ids) & (keys[found] == wanted), found, -1)

    def count_draws(
        self,
        by_load: NDArray[np.bool_],
        tried: NDArray[np.bool_],
        diverged: NDArray[np.bool_],
        latent: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """For each group how many draws the ``tried`` trials are, and how many of them diverged, or
        did in bits only: shape [3, n_groups].

        ``by_load``, by group: a load counts once however often it ran, as what any trial of it was.
        """
        by_trial = [self.per_group(trials) for trials in (tried, diverged, latent)]
        n_loads = len(self.group_of_load)
        loads = [_flag(self.load[trials], n_loads) for trials in (tried, diverged, latent)]
        loads[2] &= ~loads[1]
        of_load = [np.bincount(self.group_of_load[x], minlength=self.n_groups) for x in loads]
        return np.where(by_load, of_load, by_trial)

    def is_witnessed(self, *, exactly: bool) -> NDArray[np.bool_]:
        """Did the batch asked for really run, or any batch at all if not ``exactly``?

        False where the backend does not say.
        """
        achieved, asked = self.column("achieved"), self.column("batch_size")
        is_witnessed: NDArray[np.bool_] = achieved == asked
        return is_witnessed if exactly else is_witnessed | ((achieved > 1) & (asked > 1))


def purpose_code(purpose: Purpose) -> int:
    return PURPOSES.index(purpose)


def group_trials(
    rows: NDArray[np.void], completions: Sequence[Completions], references: Sequence[int]
) -> Trials:
    """``rows``: as `Trials` holds them, with completions by their index.

    By group there is one of ``completions`` and the trial that gave the reference, NO_TRIAL where
    none did.
    """
    first_completion = np.concatenate(([0], np.cumsum([len(each) for each in completions])))
    group = rows["group"].astype(np.int64)
    completion = first_completion[group] + rows["completion"]
    is_first = np.ones(len(rows), np.bool_)
    is_first[1:] = (group[1:] != group[:-1]) | (rows["trial"][1:] != rows["trial"][:-1])
    starts = np.flatnonzero(is_first)
    ids, group_of_trial = rows["trial"][starts], group[starts]
    load = number_distinct(group_of_trial, rows["load"][starts])
    _, first = np.unique(load, return_index=True)
    divergence = joined([each.first_divergences for each in completions], np.int32)[completion]
    divergence = np.where(divergence < 0, NO_DIVERGENCE, divergence)
    divergence = _reduce(np.minimum, divergence, starts)
    has_latent = _reduce(np.logical_or, rows["latent"] >= 0, starts)
    return Trials(
        rows=rows,
        completion=completion,
        first_completion=first_completion,
        of_row=np.cumsum(is_first) - 1,
        group=group_of_trial,
        ids=ids,
        starts=starts,
        load=load,
        group_of_load=group_of_trial[first],
        divergence=divergence,
        latent=has_latent & (divergence == NO_DIVERGENCE),
        elapsed_s=_reduce(np.maximum, rows["elapsed_s"], starts),
        commonest=_find_commonest(
            rows, completion, joined([each.counts for each in completions], np.int64)[completion]
        ),
        is_reference=ids == np.array(references, np.int64)[group_of_trial],
    )


def joined(arrays: Sequence[NDArray[Any]], kind: type[Any]) -> NDArray[Any]:
    """All end to end."""
    return np.concatenate((*arrays, np.array([], kind)))


def sum_parts(values: NDArray[np.float64], parts: NDArray[np.int64], n_parts: int) -> list[float]:
    """The sum of the values of each part; ``parts`` numbers that of each value, ascending.

    Bit for bit as NumPy adds the values of a part up by themselves: from eight on, in pairs.
    """
    sums: list[float] = np.bincount(parts, values, n_parts).tolist()
    ends = np.searchsorted(parts, np.arange(n_parts + 1))
    for part in np.flatnonzero(np.diff(ends) >= N_ADDED_IN_PAIRS).tolist():
        sums[part] = float(values[ends[part] : ends[part + 1]].sum())
    return sums


def count_bit_patterns(trials: Trials) -> NDArray[np.int64]:
    """Completions of each group that differ in tokens or in recorded bits."""
    n_completions = int(trials.first_completion[-1])
    n_patterns = np.ones(n_completions, np.int64)
    for name in ("logprobs", "row_digests"):
        is_recorded = trials.rows[name] != 0
        completion = trials.completion[is_recorded]
        pairs = number_distinct(completion, trials.rows[name][is_recorded])
        _, first = np.unique(pairs, return_index=True)
        counts = np.bincount(completion[first], minlength=n_completions)
        n_patterns = np.maximum(n_patterns, counts)
    return np.diff(np.concatenate(([0], np.cumsum(n_patterns)))[trials.first_completion])


def _find_commonest(
    rows: NDArray[np.void], completion: NDArray[np.int64], in_all: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each row the first one with the commonest completion, and bits, of its load and slot.

    Where chance may have decided which one that is (see `is_settled`), it is the one of them that
    all rows of its group gave most often, which ``in_all`` counts, so that one odd execution of two
    does not decide; then the earliest.
    """
    place = number_distinct(rows["group"], rows["load"], rows["slot"])
    kind = number_distinct(place, completion)
    in_place = _sizes(kind)
    _, one_of_kind = np.unique(kind, return_index=True)
    by_count = one_of_kind[np.lexsort((-in_place[one_of_kind], place[one_of_kind]))]
    _, most = np.unique(place[by_count], return_index=True)
    next_most = np.append(by_count, by_count[:1])[most + 1]
    is_same_place = (place[next_most] == place[by_count[most]]) & (next_most != by_count[most])
    settled = is_settled(
        in_place[by_count[most]],
        in_place[next_most] * is_same_place,
        np.bincount(place),
    )[place]
    in_bits = _sizes(number_distinct(kind, rows["logprobs"], rows["row_digests"]))
    first_key, second_key = np.where(settled, (in_place, in_all), (in_all, in_place))
    order = np.lexsort((rows["trial"], -in_bits, -second_key, -first_key, place))
    _, first, of_row = np.unique(place[order], return_index=True, return_inverse=True)
    found = np.empty(len(rows), np.int64)
    found[order] = order[first[of_row]]
    return found


def number_distinct(*columns: NDArray[Any]) -> NDArray[np.int64]:
    """One number for each distinct row of the columns, from 0."""
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        kinds, of_row = np.unique(column, return_inverse=True)
        _, numbers = np.unique(numbers * max(1, len(kinds)) + of_row, return_inverse=True)
    return numbers


def _sizes(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each row's number comes up."""
    return np.bincount(numbers)[numbers] if len(numbers) else numbers


def _flag(places: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
    found = np.zeros(length, np.bool_)
    found[places] = True
    return found


def _reduce(operation: np.ufunc, values: NDArray[Any], starts: NDArray[np.int64]) -> NDArray[Any]:
    """One value per trial (``reduceat`` refuses an empty stream)."""
    reduced: NDArray[Any] = operation.reduceat(values, starts) if len(starts) else values
    return reduced
