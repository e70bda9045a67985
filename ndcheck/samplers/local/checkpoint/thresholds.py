"""Lengths from which a model's own code may compute otherwise, by its config."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_NAMES = re.compile("window|chunk|top_?k|block|local|sparse|segment|stride|floor|distance|extent")
"""Of settings whose number may be one of tokens: others cost a longer look, and no more."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Lengths in tokens: a prompt, a longer row beside it, and how many may come after both."""

    prompt: int
    filler: int
    n_new: int

    def joined(self, other: Rows) -> Rows:
        """As long as each of the two everywhere."""
        return Rows(
            max(self.prompt, other.prompt),
            max(self.filler, other.filler),
            max(self.n_new, other.n_new),
        )


def telling_rows(config: Any, rows: Rows, short: Rows) -> Rows:
    """``short``, or longer ones where ``rows`` pass a threshold of ``config`` that it does not.

    No longer than it takes for the half or third of a row to pass it too, nor than the model takes.
    """
    passed = max((n for n in _numbers(config.to_dict()) if n < rows.filler + rows.n_new), default=0)
    most = 2 * passed
    n_new = max(short.n_new, min(rows.n_new, most + short.n_new))
    context = getattr(config, "max_position_embeddings", None) or rows.filler + n_new
    longest = max(rows.prompt, rows.filler)
    filler = min(longest, most + short.filler, context - n_new)
    if passed < short.filler + short.n_new or filler < short.filler:
        return short
    return Rows(max(short.prompt, min(rows.prompt, most + short.prompt)), filler, n_new)


def _numbers(value: Any, name: str = "") -> Iterator[int]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif type(value) is int and _NAMES.search(name):
        yield value
