"""The batch that really ran, token by token: from the server's metrics, else from its streams."""

from __future__ import annotations

import asyncio
import bisect
import re
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise

from ndcheck.samplers.endpoint.answers.answer import Answer
from ndcheck.samplers.endpoint.answers.event_stream import RequestFailure
from ndcheck.samplers.endpoint.answers.events import MAX_COUNT
from ndcheck.samplers.endpoint.transport import Transport

GAUGES = (
    "vllm:num_requests_running",
    "sglang:num_running_reqs",
    "llamacpp:requests_processing",
)
"""Requests in the running batch, by server; one line for each engine of a replicated server."""
SEARCH_INTERVAL_S = 0.005
WATCH_INTERVAL_S = 0.1
CLIENT_OVERLAP = "client-side overlap"
LEAST_STEP_S = 0.0005
"""Few models take less for a token, on average, and events that lie ready are read in less, but
for many streams at once."""
N_STREAMED = 8
"""Rows of a trial, where the server's metrics tell the batch: each event costs both sides."""


class MetricsWitness:
    """Polls one gauge while a trial runs: the largest batch that one engine had, at each moment."""

    def __init__(self, transport: Transport, gauge: str) -> None:
        self.name = gauge
        self.readings: list[tuple[float, int]] = []
        """When (`time.perf_counter` seconds) and how many, of the trial watched last."""
        self._transport = transport
        self._gauge = gauge

    @asynccontextmanager
    async def watching(self, batch_size: int) -> AsyncIterator[None]:
        """Poll until the block ends."""
        self.readings = []
        polling = asyncio.create_task(self._poll(batch_size))
        try:
            yield
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)

    async def _poll(self, batch_size: int) -> None:
        began_s = time.perf_counter()
        while True:
            started_s = time.perf_counter()
            try:
                content = await self._transport.get(f"{self._transport.root}/metrics")
            except RequestFailure:
                content = b""
            now_s = time.perf_counter()
            running = read_gauge(content, self._gauge)
            if running is not None:
                self.readings.append(((started_s + now_s) / 2, running))
            interval_s = SEARCH_INTERVAL_S
            if running is not None and running >= batch_size:
                # Often enough to see where it ends, and not for every token of a long answer.
                interval_s = min(WATCH_INTERVAL_S, max(interval_s, (now_s - began_s) / 10))
            # A large page takes the server's time too: spend at most half of it there.
            await asyncio.sleep(max(interval_s, now_s - started_s))


async def find_gauge(transport: Transport) -> str | None:
    """The gauge that this server's ``/metrics`` has, if any."""
    try:
        content = await transport.get(f"{transport.root}/metrics")
    except RequestFailure as failure:
        if failure.is_unreachable:
            raise
        return None
    return next((gauge for gauge in GAUGES if read_gauge(content, gauge) is not None), None)


def read_gauge(content: bytes, gauge: str) -> int | None:
    """The largest value of ``gauge`` in a page of Prometheus text, over its engines."""
    pattern = rb"^" + re.escape(gauge.encode()) + rb"(?:\{[^\n]*\})?[ \t]+([0-9.eE+]+)"
    try:
        values = [int(float(value)) for value in re.findall(pattern, content, re.MULTILINE)]
    except (ValueError, OverflowError):
        return None
    return max((value for value in values if value < MAX_COUNT), default=None)


def came_at_once(times_s: Sequence[float]) -> bool:
    """Was there no time for a step between parts that came at these moments, ascending?

    A proxy may hold back a stream and send all of its events together.
    """
    n_steps = len(set(times_s)) - 1
    return n_steps < 1 or times_s[-1] - times_s[0] < LEAST_STEP_S * n_steps


def even_steps(n: int, sent_s: float, last_s: float, streams: Sequence[Stream]) -> list[float]:
    """When each of ``n`` tokens of an answer in one piece was made, which came at ``last_s``.

    From when the first token came to any answer that was streamed.
    """
    step_s = (last_s - min((s.first_s for s in streams), default=sent_s)) / max(1, n)
    return [last_s - step_s * (n - 1 - i) for i in range(n)]


def batch_sizes_read(times_s: Sequence[float], readings: Sequence[tuple[float, int]]) -> list[int]:
    """The batch at each token that arrived at ``times_s``: the reading nearest to its step.

    Readings before the first token and after the last are of other batches, and are left out but
    for the last before. Empty where nothing was read in time.
    """
    if not times_s:
        return []
    readings = [reading for reading in readings if reading[0] <= times_s[-1]]
    # Before the first token the batch was still forming.
    readings = [reading for reading in readings if reading[0] >= times_s[0]] or readings[-1:]
    if not readings:
        return []
    read_s = [at_s for at_s, _ in readings]
    sizes = []
    for moment in _step_times(times_s):
        i = bisect.bisect(read_s, moment)
        nearest = min(range(max(0, i - 1), min(i + 1, len(read_s))),
                      key=lambda j: abs(read_s[j] - moment))  # fmt: skip
        sizes.append(max(1, readings[nearest][1]))  # The request itself runs.
    return sizes


@dataclass(frozen=True, slots=True)
class Stream:
    """When an answer's first and last event came; its pauses took over a third of that time."""

    first_s: float
    last_s: float
    pauses: tuple[tuple[float, float], ...]


def find_streams(answers: Iterable[Answer]) -> list[Stream]:
    """Of the answers that came in parts."""
    found = []
    for answer in answers:
        times_s = [arrival.at_s for arrival in answer.arrivals]
        if came_at_once(times_s):
            continue
        longest_s = (times_s[-1] - times_s[0]) / 3
        pauses = tuple((a, b) for a, b in pairwise(times_s) if b - a > longest_s)
        found.append(Stream(times_s[0], times_s[-1], pauses))
    return found


def batch_sizes_seen(times_s: Sequence[float], streams: Sequence[Stream]) -> list[int]:
    """The same from streams: how many answers were between their first and last token.

    One that pauses for longer than two of the steps of these tokens waits in a queue meanwhile,
    whatever it began with. Empty where the answer did not come in parts. A server that interleaves
    requests without batching them looks the same, so this is weaker than its own metrics.
    """
    if not streams or came_at_once(times_s):
        return []
    firsts, lasts = sorted(s.first_s for s in streams), sorted(s.last_s for s in streams)
    pauses = [pause for stream in streams for pause in stream.pauses]
    sizes = []
    for moment in _step_times(times_s):
        i = bisect.bisect(times_s, moment)
        step_s = times_s[i] - times_s[i - 1]
        n_waiting = sum(a < moment < b and b - a > 2 * step_s for a, b in pauses)
        n_begun, n_ended = bisect.bisect_right(firsts, moment), bisect.bisect_left(lasts, moment)
        sizes.append(n_begun - n_ended - n_waiting)
    return sizes


def held_to_streams(
    sizes: list[int],
    times_s: Sequence[float],
    streams: Sequence[Stream],
    n_rows: int,
    *,
    are_together: bool,
) -> list[int]:
    """``sizes`` that a gauge gave of ``n_rows``, no more than the streams of some of them allow.

    A server may count all that it has taken in, be it that it waits. Rows that were not seen
    together for most of the tokens were in no batch together; those that were not streamed are
    taken to be as these. Unless all were sent together, a row pauses between its requests: there,
    half of what the gauge says is enough.
    """
    n_seen = min(n_rows, N_STREAMED, len(streams))
    seen = batch_sizes_seen(times_s, streams)
    there = most_of_the_time(seen) or 0
    said = n_rows if are_together else min(n_rows, most_of_the_time(sizes) or 0)
    if not seen or there * n_rows >= said * n_seen * (1 if are_together else 0.5):
        return sizes
    return [
        min(size, max(1, n_rows * n_there // n_seen))
        for size, n_there in zip(sizes, seen, strict=True)
    ]


def _step_times(times_s: Sequence[float]) -> list[float]:
    """A moment within the step that made each token: halfway since the token before it.

    Rows of one step arrive one after the other, so that what holds at an arrival is an accident.
    The first token's own step cannot be seen: it is taken to be as the second's.
    """
    moments = [times_s[0]]
    for before_s, token_s in pairwise(times_s):
        # Tokens of one event share its step.
        moments.append(moments[-1] if token_s == before_s else (before_s + token_s) / 2)
    first_step = next((m for m in moments if m > times_s[0]), times_s[0])
    return [first_step if m == times_s[0] else m for m in moments]


def most_of_the_time(sizes: Sequence[int]) -> int | None:
    """The largest batch that more than half of the tokens had at least; None for no token."""
    return sorted(sizes, reverse=True)[len(sizes) // 2] if sizes else None
