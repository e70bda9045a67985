"""The trials of one probe in one arm, and how each compares with the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.accumulating import PURPOSES, is_settled
from ndcheck.analysis.divergence import Reference
from ndcheck.analysis.summary import Draw
from ndcheck.analysis.unique import Completions
from ndcheck.records import Axis, Purpose

NO_DIVERGENCE = np.iinfo(np.int32).max
NO_TRIAL = -1
VARIED_AXES: tuple[Axis, ...] = ("slot", "neighbours", "cache", "width", "scoring")
"""Those whose trials are no baselines, so that only `plan_confirmations` repeats them."""


@dataclass(frozen=True, slots=True)
class Trials:
    """``rows`` are OUTCOME rows by trial and slot, none with an error; the rest is per trial.

    Trial i has the rows ``starts[i]`` to ``starts[i + 1]``. ``divergence`` is the first token at
    which any of its rows differs from the reference, NO_DIVERGENCE where none does. ``latent``:
    the tokens are the reference's, the bits are not. ``commonest`` gives for each row the one that
    stands for its load and slot, and ``is_reference`` is the trial that gave the reference.
    """

    rows: NDArray[np.void]
    of_row: NDArray[np.int64]
    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    divergence: NDArray[np.int32]
    latent: NDArray[np.bool_]
    elapsed_s: NDArray[np.float64]
    commonest: NDArray[np.int64]
    is_reference: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> NDArray[Any]:
        """A column that all rows of a trial share, one value per trial."""
        return self.rows[name][self.starts]

    @property
    def diverged(self) -> NDArray[np.bool_]:
        return self.divergence < NO_DIVERGENCE

    @property
    def is_decoded(self) -> NDArray[np.bool_]:
        """Were all of its tokens generated one by one?"""
        is_decoded: NDArray[np.bool_] = (self.column("width") == 1) & (
            self.column("fed_tokens") == 0
        )
        return is_decoded

    @property
    def is_repeated(self) -> NDArray[np.bool_]:
        """Did the trial's load run more than once?"""
        return _sizes(_number(self.column("load"))) > 1

    @property
    def is_confirmation(self) -> NDArray[np.bool_]:
        """Was it run only because its load had diverged? Such a trial is no draw of any rate."""
        purpose, baseline = self.column("purpose"), self.column("baseline")
        place = np.searchsorted(self.ids, baseline).clip(max=max(0, len(self) - 1))
        is_known = np.isin(baseline, self.ids)
        of_varied = np.isin(purpose[place], [purpose_code(a) for a in VARIED_AXES]) & is_known
        is_confirmation: NDArray[np.bool_] = of_varied & (purpose == purpose_code("run-to-run"))
        return is_confirmation

    @property
    def is_planned_repeat(self) -> NDArray[np.bool_]:
        """Did its load run more than once by plan, whatever came of it?"""
        planned = np.flatnonzero(~self.is_confirmation)
        found = np.zeros(len(self), np.bool_)
        found[planned] = _sizes(_number(self.column("load")[planned])) > 1
        return found

    def count_draws(
        self,
        draw: Draw,
        tried: NDArray[np.int64],
        diverged: NDArray[np.int64],
        latent: NDArray[np.int64],
    ) -> tuple[int, int, int]:
        """How many draws the ``tried`` trials are, and how many diverged, or did in bits only.

        All are indices of trials. A load counts once however often it ran, as what any trial of it
        was.
        """
        if draw == "trial":
            return len(tried), len(diverged), len(latent)
        loads = self.column("load")
        parted = np.unique(loads[diverged])
        return (
            len(np.unique(loads[tried])),
            len(parted),
            len(np.setdiff1d(loads[latent], parted)),
        )

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
    rows: NDArray[np.void], completions: Completions, reference: Reference | None
) -> Trials:
    """``rows``: as `Trials` holds them, with completions by their index."""
    ids, starts, of_row = np.unique(rows["trial"], return_index=True, return_inverse=True)
    divergence = completions.first_divergences[rows["completion"]]
    divergence = np.where(divergence < 0, NO_DIVERGENCE, divergence)
    divergence = _reduce(np.minimum, divergence, starts)
    has_latent = _reduce(np.logical_or, rows["latent"] >= 0, starts)
    return Trials(
        rows=rows,
        of_row=of_row,
        ids=ids,
        starts=starts,
        divergence=divergence,
        latent=has_latent & (divergence == NO_DIVERGENCE),
        elapsed_s=_reduce(np.maximum, rows["elapsed_s"], starts),
        commonest=_find_commonest(rows, completions),
        is_reference=ids == (reference.trial_id if reference else NO_TRIAL),
    )


def count_bit_patterns(rows: NDArray[np.void], n_unique: int) -> int:
    """Completions that differ in tokens or in recorded bits."""
    n_patterns = np.ones(n_unique, np.int64)
    for name in ("logprobs", "row_digests"):
        recorded = rows[rows[name] != 0]
        pairs = _number(recorded["completion"], recorded[name])
        _, first = np.unique(pairs, return_index=True)
        counts = np.bincount(recorded["completion"][first], minlength=n_unique)
        n_patterns = np.maximum(n_patterns, counts)
    return int(n_patterns.sum())


def _find_commonest(rows: NDArray[np.void], completions: Completions) -> NDArray[np.int64]:
    """For each row the first one with the commonest completion, and bits, of its load and slot.

    Where chance may have decided which one that is (see `is_settled`), it is the one of them that
    all rows gave most often, so that one odd execution of two does not decide; then the earliest.
    """
    place = _number(rows["load"], rows["slot"])
    kind = _number(place, rows["completion"])
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
    in_bits = _sizes(_number(place, rows["completion"], rows["logprobs"], rows["row_digests"]))
    in_all = completions.counts[rows["completion"]]
    first_key, second_key = np.where(settled, (in_place, in_all), (in_all, in_place))
    order = np.lexsort((rows["trial"], -in_bits, -second_key, -first_key, place))
    _, first, of_row = np.unique(place[order], return_index=True, return_inverse=True)
    found = np.empty(len(rows), np.int64)
    found[order] = order[first[of_row]]
    return found


def _number(*columns: NDArray[Any]) -> NDArray[np.int64]:
    """One number for each distinct row of the columns, from 0."""
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        kinds, of_row = np.unique(column, return_inverse=True)
        _, numbers = np.unique(numbers * max(1, len(kinds)) + of_row, return_inverse=True)
    return numbers


def _sizes(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each row's number comes up."""
    return np.bincount(numbers)[numbers] if len(numbers) else numbers


def _reduce(operation: np.ufunc, values: NDArray[Any], starts: NDArray[np.int64]) -> NDArray[Any]:
    """One value per trial (``reduceat`` refuses an empty stream)."""
    reduced: NDArray[Any] = operation.reduceat(values, starts) if len(starts) else values
    return reduced
