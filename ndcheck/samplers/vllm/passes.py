"""What an engine's scheduler put into each forward pass, and what that says of a trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, int, int, int, int, int]
"""Number of equal passes in a row, then of each: rows, tokens, running, waiting, preempted."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: its tokens by row, and the requests around it by their state."""

    tokens_of_row: dict[int, int]
    running: int
    waiting: int
    preempted: int

    def has_prompt_beside(self, slots: Sequence[int], n_rows: int) -> bool:
        """Whether each of ``slots`` had one token, and a row from ``n_rows`` on several."""
        tokens = self.tokens_of_row
        return all(tokens.get(slot) == 1 for slot in slots) and any(
            row >= n_rows and n > 1 for row, n in tokens.items()
        )


def describe_shape(passes: Sequence[Pass]) -> list[Shape]:
    """The passes in order, equal ones next to each other counted together."""
    shapes: list[Shape] = []
    for each in passes:
        shape = (
            len(each.tokens_of_row),
            sum(each.tokens_of_row.values()),
            each.running,
            each.waiting,
            each.preempted,
        )
        if shapes and shapes[-1][1:] == shape:
            shapes[-1] = (shapes[-1][0] + 1, *shape)
        else:
            shapes.append((1, *shape))
    return shapes


def count_prefills(passes: Sequence[Pass], row: int, n_tokens: int) -> int:
    """In how many passes the ``n_tokens`` of a row's prompt were computed; 0 if they never were."""
    n_done = n_passes = 0
    for each in passes:
        if row in each.tokens_of_row:
            n_done += each.tokens_of_row[row]
            n_passes += 1
            if n_done >= n_tokens:
                return n_passes
    return 0


def smallest_batch(shapes: Sequence[Shape]) -> int:
    """The fewest rows of any pass: fewer than asked for where a trial was split or queued."""
    return min((rows for _, rows, *_ in shapes), default=0)
