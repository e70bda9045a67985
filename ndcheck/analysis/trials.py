"""The trials of one probe in one arm, and how each compares with the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.outcomes import AXIS_CODES
from ndcheck.analysis.unique import Completions
from ndcheck.records import Axis

NO_DIVERGENCE = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class Trials:
    """``rows`` are OUTCOME rows by trial and slot, none with an error; the rest is per trial.

    Trial i has the rows ``starts[i]`` to ``starts[i + 1]``. ``divergence`` is the first token at
    which any of its rows differs from the reference, NO_DIVERGENCE where none does. ``latent``:
    the tokens are the reference's, the bits are not.
    """

    rows: NDArray[np.void]
    of_row: NDArray[np.int64]
    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    divergence: NDArray[np.int32]
    latent: NDArray[np.bool_]
    elapsed_s: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> NDArray[Any]:
        """A column that all rows of a trial share, one value per trial."""
        return self.rows[name][self.starts]

    @property
    def diverged(self) -> NDArray[np.bool_]:
        return self.divergence < NO_DIVERGENCE

    @property
    def is_evidence(self) -> NDArray[np.bool_]:
        """False for the reference, and for batches that only serve as baselines."""
        is_evidence: NDArray[np.bool_] = self.column("axis") != axis_code("reference")
        return is_evidence

    def is_witnessed(self, *, exactly: bool) -> NDArray[np.bool_]:
        """Did the batch asked for really run, or any batch at all if not ``exactly``?

        False where the backend does not say.
        """
        achieved, asked = self.column("achieved"), self.column("batch_size")
        is_witnessed: NDArray[np.bool_] = achieved == asked
        return is_witnessed if exactly else is_witnessed | ((achieved > 1) & (asked > 1))


def axis_code(axis: Axis) -> int:
    return AXIS_CODES.index(axis)


def group_trials(rows: NDArray[np.void], completions: Completions) -> Trials:
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
    )


def _reduce(operation: np.ufunc, values: NDArray[Any], starts: NDArray[np.int64]) -> NDArray[Any]:
    """One value per trial (``reduceat`` refuses an empty stream)."""
    reduced: NDArray[Any] = operation.reduceat(values, starts) if len(starts) else values
    return reduced
