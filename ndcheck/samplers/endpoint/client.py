"""One request after another: asked, retried within bounds, and what became of it kept."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from ndcheck.samplers.endpoint.answer import Answer, Compared, RequestFailure
from ndcheck.samplers.endpoint.dialects import Body, Dialect, Generate
from ndcheck.samplers.endpoint.transport import Transport

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
BYTES_PER_TOKEN = 4096
"""An event with a token, its id and two log-probabilities takes some 600."""
BYTES_PER_ANSWER = 1 << 20


@dataclass(slots=True)
class Outcome:
    """What became of one request; ``retried_after`` is the failure before the last retry."""

    answer: Answer | None = None
    error: str | None = None
    is_unreachable: bool = False
    elapsed_s: float = 0.0
    n_retries: int = 0
    retried_after: str | None = None


class Client:
    """Asks one server in one dialect."""

    def __init__(self, transport: Transport, dialect: Dialect, n_retries: int) -> None:
        self._transport = transport
        self._dialect = dialect
        self._n_retries = n_retries
        base = transport.root if isinstance(dialect, Generate) else transport.base
        self._url = f"{base}{dialect.path}"

    async def ask(
        self,
        body: Body,
        max_tokens: int,
        compared: Compared = "text",
        outcome: Outcome | None = None,
    ) -> Answer:
        """A whole answer; its retries are counted in ``outcome``. Raises RequestFailure."""
        outcome = outcome or Outcome()
        while True:
            try:
                answer = await self._ask_once(body, max_tokens)
                answer.check(max_tokens, compared)
            except RequestFailure as failure:
                if not failure.is_temporary or outcome.n_retries >= self._n_retries:
                    raise
                pause_s = FIRST_PAUSE_S * 2**outcome.n_retries
                if failure.retry_after_s is not None:
                    pause_s = failure.retry_after_s
                outcome.n_retries += 1
                outcome.retried_after = str(failure)
            else:
                return answer
            await asyncio.sleep(min(pause_s, LONGEST_PAUSE_S))

    async def record(
        self, body: Body, max_tokens: int, compared: Compared, outcome: Outcome
    ) -> None:
        """Ask, and keep the answer or the failure in ``outcome``."""
        started = time.perf_counter()
        try:
            outcome.answer = await self.ask(body, max_tokens, compared, outcome)
        except RequestFailure as failure:
            outcome.is_unreachable = failure.is_unreachable
            retries = f" (after {outcome.n_retries} retries)" if outcome.n_retries else ""
            outcome.error = f"{failure}{retries}"
        outcome.elapsed_s = time.perf_counter() - started

    async def _ask_once(self, body: Body, max_tokens: int) -> Answer:
        answer = Answer()

        def take(event: dict[str, Any]) -> None:
            if self._dialect.read(event, answer):
                answer.mark(time.perf_counter())

        max_bytes = BYTES_PER_ANSWER + BYTES_PER_TOKEN * max_tokens
        await self._transport.stream(self._url, body, max_bytes, take)
        return answer
