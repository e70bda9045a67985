"""The batch that really ran: read from the server's metrics, else from how answers overlap."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from ndcheck.samplers.endpoint.answer import Answer, RequestFailure
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


class MetricsWitness:
    """Polls one gauge while a trial runs and keeps the largest batch that one engine reported."""

    def __init__(self, transport: Transport, gauge: str) -> None:
        self.name = gauge
        self.peak: int | None = None
        self._transport = transport
        self._gauge = gauge

    @asynccontextmanager
    async def watching(self, batch_size: int) -> AsyncIterator[None]:
        """Poll until the block ends; ``peak`` is then the largest value seen, None if unknown.

        Once ``batch_size`` has been seen, only larger batches are news: others' requests.
        """
        self.peak = None
        polling = asyncio.create_task(self._poll(batch_size))
        try:
            yield
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)

    async def _poll(self, batch_size: int) -> None:
        while True:
            started = time.perf_counter()
            try:
                content = await self._transport.get(f"{self._transport.root}/metrics")
            except RequestFailure:
                return
            running = read_gauge(content, self._gauge)
            if running is not None:
                self.peak = max(running, self.peak or 0)
            is_found = self.peak is not None and self.peak >= batch_size
            interval_s = WATCH_INTERVAL_S if is_found else SEARCH_INTERVAL_S
            # A large page takes the server's time too: spend at most half of it there.
            await asyncio.sleep(max(interval_s, time.perf_counter() - started))


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
    pattern = rb"^" + re.escape(gauge.encode()) + rb"(?:\{[^\n]*\})? ([0-9.eE+]+)"
    try:
        values = [int(float(value)) for value in re.findall(pattern, content, re.MULTILINE)]
    except (ValueError, OverflowError):
        return None
    return max(values, default=None)


def overlap(answers: Iterable[Answer]) -> int | None:
    """The most answers that were between their first and last token at one time.

    None where no answer came in parts: nothing can be seen then. A server that interleaves
    requests without batching them looks the same, so this is weaker than its own metrics.
    """
    spans = [(a.first_s, a.last_s) for a in answers if a.first_s is not None]
    spans = [(first, last) for first, last in spans if first < last]
    if not spans:
        return None
    edges = sorted([(first, 1) for first, _ in spans] + [(last, -1) for _, last in spans])
    most = running = 0
    for _, step in edges:
        running += step
        most = max(most, running)
    return most
