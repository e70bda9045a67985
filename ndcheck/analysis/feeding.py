"""Tokens that were fed again, and which widths of passes give them the same bits."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.summary import FedTokens

Classes = tuple[tuple[int, ...], ...]


def count_fed(rows: NDArray[np.void], *, with_classes: bool) -> FedTokens:
    """``rows`` are OUTCOME rows of loads that were fed."""
    return FedTokens(
        n_tokens=int(rows["fed_tokens"].sum()),
        n_other_bits=int(rows["other_bits"].sum()),
        n_other_tokens=int(rows["other_tokens"].sum()),
        width_classes=_classes_by_size(rows) if with_classes else (),
    )


def _classes_by_size(rows: NDArray[np.void]) -> tuple[tuple[int, Classes], ...]:
    """By batch size; where several batches were fed, of the one that was at most widths."""
    found = []
    for size in np.unique(rows["batch_size"]).tolist():
        of_size = rows[rows["batch_size"] == size]
        baselines, first = np.unique(of_size["baseline"], return_index=True)
        n_widths = [len(np.unique(of_size["width"][of_size["baseline"] == b])) for b in baselines]
        best = max(range(len(first)), key=lambda i: (n_widths[i], -first[i]))
        found.append((size, _classes(of_size[of_size["baseline"] == baselines[best]])))
    return tuple(found)


def _classes(rows: NDArray[np.void]) -> Classes:
    """The widths, 1 for decoding, by the bits of every slot of one batch."""
    bits: dict[int, dict[int, int]] = defaultdict(dict)
    for width, slot, fed, decoded in rows[
        ["width", "slot", "fed_digest", "decoded_digest"]
    ].tolist():
        bits[1][slot] = decoded
        bits[width][slot] = fed
    classes: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for width in sorted(bits):
        classes.setdefault(tuple(sorted(bits[width].items())), []).append(width)
    return tuple(map(tuple, classes.values()))
