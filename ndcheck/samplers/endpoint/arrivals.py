"""When the requests of a trial are sent: together, in a closed loop, or as an open loop."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence

from ndcheck.load import Arrival
from ndcheck.records import Load

Send = Callable[[int, int], Awaitable[None]]
"""(row, number) -> send one filler: the number tells the fillers of one row apart."""
MAX_LEAD_FILLERS = 2


async def run_trial(
    load: Load,
    arrival: Arrival,
    probes: Sequence[Callable[[], Awaitable[None]]],
    send_filler: Send,
) -> None:
    """Send every row of ``load``; returns when all probes have their answers.

    In a closed loop each row sends its next request when the last one is answered: a probe's row
    some fillers before the probe, and all rows fillers after it, so that the number in flight
    stays ``load.batch_size`` while any probe runs.
    """
    by_row = dict(zip(load.slots, probes, strict=True))
    if arrival.kind == "closed" and load.batch_size > 1:
        await _run_closed(load, by_row, send_filler)
        return
    offsets = arrival.offsets_s(load)

    async def run_row(row: int) -> None:
        if offsets[row]:
            await asyncio.sleep(offsets[row])
        await (by_row[row]() if row in by_row else send_filler(row, 0))

    async with asyncio.TaskGroup() as group:
        for row in range(load.batch_size):
            group.create_task(run_row(row))


async def _run_closed(
    load: Load, by_row: dict[int, Callable[[], Awaitable[None]]], send_filler: Send
) -> None:
    rng = random.Random(f"{load.filler_seed}/{load.batch_size}/lead")
    leads = [rng.randint(0, MAX_LEAD_FILLERS) for _ in range(load.batch_size)]
    n_unanswered = len(by_row)

    async def run_row(row: int) -> None:
        nonlocal n_unanswered
        numbers = itertools.count()
        if row in by_row:
            for number in itertools.islice(numbers, leads[row]):
                await send_filler(row, number)
            await by_row[row]()
            n_unanswered -= 1
        # The last fillers are awaited too: none may run on into the next trial's batch.
        while n_unanswered:
            await send_filler(row, next(numbers))

    async with asyncio.TaskGroup() as group:
        for row in range(load.batch_size):
            group.create_task(run_row(row))
