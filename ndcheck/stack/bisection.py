"""Which of several changes flips a verdict? Pure: what tests a set of changes is given.

The first k changes are applied, in one order, and k is halved: where no change passes and all fail,
some change must flip the verdict, whether or not the others matter too. Sets that cannot be tested
(they do not install, or the command neither passes nor fails) are stepped around.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["good", "bad", "unknown"]
Test = Callable[[frozenset[int]], Outcome]
"""Of the changes with these numbers."""


@dataclass(frozen=True, slots=True)
class Found:
    """``suspects``: one change, or several where no set between them could be tested.

    ``alone`` is the verdict with nothing but them; ``problem`` says why there are none.
    """

    suspects: tuple[int, ...]
    alone: Outcome | None = None
    problem: str | None = None


def bisect(n: int, test: Test) -> Found:
    """Find the change among n that flips the verdict, and test it alone."""
    if (outcome := test(_first(0))) != "good":
        return Found((), problem=f"the good lock is {outcome}: there is no change to find")
    if (outcome := test(_first(n))) != "bad":
        return Found((), problem=f"the bad lock is {outcome}: there is no change to find")
    low, high = 0, n
    untestable: set[int] = set()
    while untried := [k for k in range(low + 1, high) if k not in untestable]:
        middle = min(untried, key=lambda k: abs(2 * k - low - high))
        outcome = test(_first(middle))
        if outcome == "good":
            low = middle
        elif outcome == "bad":
            high = middle
        else:
            untestable.add(middle)
    suspects = tuple(range(low, high))
    return Found(suspects, test(frozenset(suspects)))


def _first(k: int) -> frozenset[int]:
    return frozenset(range(k))
