"""When a load's requests arrive: one notation for both clocks, decode steps and seconds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from ndcheck.errors import UsageError
from ndcheck.records import CLOSED_ARRIVALS, Load

Clock = Literal["step", "s"]
"""Decode steps where the batching is ours, seconds where it is a server's."""
CLOCKS: dict[Clock, str] = {"step": "decode steps", "s": "seconds"}
NOTATION = "together, closed, poisson:RATE/CLOCK or bursts:SIZE:GAPCLOCK"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """``together``, ``closed``, ``poisson`` with a rate, or ``bursts`` of a size.

    ``rate`` is in requests a unit of the clock, ``gap`` in units of the clock.
    """

    kind: str
    clock: Clock
    rate: float = 0.0
    burst_size: int = 0
    gap: float = 0.0

    def __str__(self) -> str:
        """As an option gives them, with their clock."""
        unit = {"poisson": f"/{self.clock}", "bursts": self.clock}.get(self.kind, "")
        return self.recorded + unit

    @property
    def recorded(self) -> str:
        """As a spec holds them, whose fields have one clock each."""
        if self.kind == "poisson":
            return f"poisson:{_digits(self.rate)}"
        if self.kind == "bursts":
            return f"bursts:{self.burst_size}:{_digits(self.gap)}"
        return self.kind

    def offsets(self, load: Load) -> list[float]:
        """When each row of an open loop arrives, by the clock from the start, in row order."""
        if self.kind == "poisson":
            rng = random.Random(f"{load.filler_seed}/{load.batch_size}")
            offsets = [0.0]
            for _ in range(load.batch_size - 1):
                offsets.append(offsets[-1] + rng.expovariate(self.rate))
            return offsets
        if self.kind == "bursts":
            return [row // self.burst_size * self.gap for row in range(load.batch_size)]
        return [0.0] * load.batch_size


def _digits(number: float) -> str:
    return str(number).removesuffix(".0")


def parse_arrivals(text: str, clock: Clock) -> Arrivals:
    """``together``, ``closed``, ``poisson:RATE/CLOCK`` or ``bursts:SIZE:GAPCLOCK``.

    A number without a clock is by ``clock``, the only one that the backend has: so specs and
    command lines from before the clock was named hold them. Raises UsageError.
    """
    arrivals = _parse(text, clock)
    if arrivals is None:
        raise UsageError(
            f"--arrivals {text}: give together, closed, poisson:RATE/{clock} or "
            f"bursts:SIZE:GAP{clock} (the clock here is {CLOCKS[clock]})"
        )
    return arrivals


def with_clock(recorded: str, clock: Clock) -> str:
    """What a spec holds as an option gives it; unchanged where it is neither."""
    arrivals = _parse(recorded, clock)
    return recorded if arrivals is None else str(arrivals)


def _parse(text: str, clock: Clock) -> Arrivals | None:
    kind, *numbers = text.split(":")
    try:
        if kind in CLOSED_ARRIVALS and not numbers:
            return Arrivals(kind, clock)
        if kind == "poisson":
            (rate,) = (float(number.removesuffix(f"/{clock}")) for number in numbers)
            return Arrivals(kind, clock, rate=rate) if 0 < rate < float("inf") else None
        if kind == "bursts":
            size, gap = int(numbers[0]), float(numbers[1].removesuffix(clock))
            if len(numbers) == 2 and size >= 1 and 0 < gap < float("inf"):
                return Arrivals(kind, clock, burst_size=size, gap=gap)
    except (ValueError, IndexError):
        pass
    return None
