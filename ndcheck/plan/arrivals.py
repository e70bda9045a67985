"""When a load's requests are sent to a server: together, or in a closed or open loop."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ndcheck.records import Endpoint, Load


@dataclass(frozen=True, slots=True)
class Arrival:
    """``together``, ``closed``, ``poisson`` with a rate per second, or ``bursts`` of a size."""

    kind: str
    rate_per_s: float = 0.0
    burst_size: int = 0
    gap_s: float = 0.0

    def offsets_s(self, load: Load) -> list[float]:
        """When each row of an open loop is sent, in seconds from the start, in row order."""
        if self.kind == "poisson":
            rng = random.Random(f"{load.filler_seed}/{load.batch_size}")
            offsets = [0.0]
            for _ in range(load.batch_size - 1):
                offsets.append(offsets[-1] + rng.expovariate(self.rate_per_s))
            return offsets
        if self.kind == "bursts":
            return [row // self.burst_size * self.gap_s for row in range(load.batch_size)]
        return [0.0] * load.batch_size


def parse_arrival(text: str) -> Arrival | None:
    """``together``, ``closed``, ``poisson:RATE`` or ``bursts:SIZE:SECONDS``; None if neither."""
    kind, *numbers = text.split(":")
    try:
        if kind in Endpoint.CLOSED_ARRIVALS and not numbers:
            return Arrival(kind)
        if kind == "poisson":
            (rate,) = map(float, numbers)
            return Arrival(kind, rate_per_s=rate) if 0 < rate < float("inf") else None
        if kind == "bursts":
            size, gap = int(numbers[0]), float(numbers[1])
            if len(numbers) == 2 and size >= 1 and 0 < gap < float("inf"):
                return Arrival(kind, burst_size=size, gap_s=gap)
    except (ValueError, IndexError):
        pass
    return None
