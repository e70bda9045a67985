"""When the requests of a trial are sent: together, in a closed loop, or as an open loop."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence

from ndcheck.plan.arrivals import Arrivals
from ndcheck.records import Load

Send = Callable[[int, int], Awaitable[bool]]
"""(row, number) -> send one filler; False if it failed. The number tells those of a row apart."""
MAX_LEAD_FILLERS = 2


async def run_trial(
    load: Load,
    arrivals: Arrivals,
    probes: Sequence[Callable[[], Awaitable[None]]],
    send_filler: Send,
) -> None:
    """Send every row of ``load``; returns when all requests have their answers.

    Unless the loop is open, a filler that ends while any probe runs is replaced, so that the
    number in flight stays ``load.batch_size``. In a closed loop a probe's row also sends some
    fillers before the probe, and every row goes on with fillers after it.
    """
    by_row = dict(zip(load.slots, probes, strict=True))
    is_closed = arrivals.kind == "closed" and load.batch_size > 1
    offsets = arrivals.offsets(load)
    rng = random.Random(f"{load.filler_seed}/{load.batch_size}/lead")
    leads = [rng.randint(0, MAX_LEAD_FILLERS) for _ in range(load.batch_size)]
    n_unanswered = len(by_row)

    async def run_row(row: int) -> None:
        nonlocal n_unanswered
        if offsets[row]:
            await asyncio.sleep(offsets[row])
        numbers = itertools.count()
        is_refilled = is_closed or arrivals.kind == "together"
        if row in by_row:
            for number in itertools.islice(numbers, leads[row] if is_closed else 0):
                await send_filler(row, number)
            await by_row[row]()
            n_unanswered -= 1
            # Copies sent together end together: fillers after them would only prolong the trial.
            is_refilled = is_closed
        else:
            is_refilled &= await send_filler(row, next(numbers))
        # The last fillers are awaited too: none may run on into the next trial's batch.
        while is_refilled and n_unanswered:
            is_refilled = await send_filler(row, next(numbers))

    async with asyncio.TaskGroup() as group:
        for row in range(load.batch_size):
            group.create_task(run_row(row))
