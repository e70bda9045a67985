"""Who arrives when under continuous batching: a seeded queue of requests, timed in decode steps.

A step of the server is the clock, so the same load meets the same requests at the same tokens
whatever the machine's speed. The load's rows arrive in the order of their slots; other requests
keep them company, with prompts, lengths and times drawn from the load's seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ndcheck.plan.arrivals import Arrivals
from ndcheck.records import Load


@dataclass(frozen=True, slots=True)
class Request:
    """A request of the queue.

    ``slot`` is the row of the load, None for one that only keeps company. A filler's prompt has
    ``n_prompt_tokens`` and is drawn from ``filler_seed``; both are None where it is the probe's.
    ``arrives_at`` is in decode steps, and 0 for one that only waits for a place.
    """

    slot: int | None
    filler_seed: int | None
    n_prompt_tokens: int | None
    max_tokens: int
    arrives_at: float = 0.0

    @property
    def is_probe(self) -> bool:
        return self.filler_seed is None


def queue_requests(
    load: Load, arrivals: Arrivals, prompt_length: int, max_tokens: int
) -> Iterator[Request]:
    """Requests in the order of their arrival.

    ``closed``: the places are taken by others when the load's rows come, each as one of them
    leaves, and whoever leaves is replaced, without end. ``together``: the rows come at once, and
    nobody after them. ``poisson`` and ``bursts``: the rows come at random or in bursts, then
    others, without end. A probe alone (batch size 1) has no company.
    """
    kind = arrivals.kind
    rng = random.Random(load.filler_seed)
    now, n_arrived = 0.0, 0

    def arrival_time() -> float:
        nonlocal now, n_arrived
        if kind == "poisson":
            now += rng.expovariate(arrivals.rate)
        elif kind == "bursts":
            now = n_arrived // arrivals.burst_size * arrivals.gap
        n_arrived += 1
        return now

    def company(nth: int, longest: int) -> Request:
        length = rng.choice(load.filler_lengths or (prompt_length,))
        n_tokens = rng.randint(max(1, longest // 4), longest)
        return Request(None, load.filler_seed + load.batch_size + nth, length, n_tokens,
                       arrival_time())  # fmt: skip

    n_company = 0
    if kind == "closed" and load.batch_size > 1:
        for n_company in range(1, load.batch_size + 1):
            # Short ones, so that the rows soon come, and not all at the same step.
            yield company(n_company, max(1, max_tokens // 2))
    fillers = iter(enumerate(load.filler_lengths))
    for row in range(load.batch_size):
        if row in load.slots:
            yield Request(row, None, None, max_tokens, arrival_time())
        else:
            nth, length = next(fillers)
            n_tokens = rng.randint(max(1, max_tokens // 4), max_tokens)
            yield Request(row, load.filler_seed + nth, length, n_tokens, arrival_time())
    while kind != "together" and load.batch_size > 1:
        n_company += 1
        yield company(n_company, max_tokens)
