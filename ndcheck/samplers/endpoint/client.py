"""Send requests, retry them within bounds, and keep what became of each."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from ndcheck.samplers.endpoint.answers.answer import Answer, Compared
from ndcheck.samplers.endpoint.answers.dialects import Body, Dialect, Generate
from ndcheck.samplers.endpoint.answers.event_stream import Event, RequestFailure, snippet
from ndcheck.samplers.endpoint.transport import Transport

INVALID = (400, 422)
FIRST_PAUSE_S = 0.5
REPORTED_PAUSE_S = 2.0
REPORT_INTERVAL_S = 10.0
BYTES_PER_TOKEN = 4096
"""An event with a token, its id and two log-probabilities takes some 600."""
BYTES_PER_ANSWER = 1 << 20


@dataclass(slots=True)
class Outcome:
    """What became of one request; ``retried_after`` is the failure before the last retry.

    ``is_invalid``: the server refused it as one that can never succeed.
    """

    answer: Answer | None = None
    error: str | None = None
    is_unreachable: bool = False
    is_invalid: bool = False
    elapsed_s: float = 0.0
    n_retries: int = 0
    retried_after: str | None = None


class Client:
    """Asks one server in one dialect.

    ``extra_body`` goes with every request. A server that asks to wait is obeyed, up to
    ``longest_pause_s``; ``say`` is told of it.
    """

    def __init__(
        self,
        transport: Transport,
        dialect: Dialect,
        n_retries: int,
        longest_pause_s: float,
        extra_body: Body,
        say: Callable[[str], None],
    ) -> None:
        self._transport = transport
        self._dialect = dialect
        self._n_retries = n_retries
        self._longest_pause_s = longest_pause_s
        self._extra_body = extra_body
        self._say = say
        self._said_s = -math.inf
        base = transport.root if isinstance(dialect, Generate) else transport.base
        self._url = f"{base}{dialect.path}"

    async def ask(
        self,
        body: Body,
        max_tokens: int,
        check: Callable[[Answer], None] = lambda answer: None,
        outcome: Outcome | None = None,
    ) -> Answer:
        """A whole answer that passes ``check``; its retries are counted in ``outcome``.

        Raises RequestFailure.
        """
        outcome = outcome or Outcome()
        while True:
            try:
                answer = await self._ask_once(body, max_tokens)
                check(answer)
            except RequestFailure as failure:
                if not failure.is_temporary or outcome.n_retries >= self._n_retries:
                    raise
                pause_s = FIRST_PAUSE_S * 2**outcome.n_retries
                if failure.retry_after_s is not None:
                    pause_s = failure.retry_after_s
                if not pause_s <= self._longest_pause_s:
                    raise RequestFailure(
                        f"{failure} (the server asks to wait {pause_s:.6g} s, longer than "
                        f"--timeout {self._longest_pause_s:g})",
                        status=failure.status,
                    ) from failure
                outcome.n_retries += 1
                outcome.retried_after = str(failure)
            else:
                return answer
            await self._wait(pause_s, outcome)

    async def record(
        self, body: Body, max_tokens: int, check: Callable[[Answer], None], outcome: Outcome
    ) -> None:
        """Ask, and keep the answer or the failure in ``outcome``."""
        started = time.perf_counter()
        try:
            outcome.answer = await self.ask(body, max_tokens, check, outcome)
        except RequestFailure as failure:
            outcome.is_unreachable = failure.is_unreachable
            outcome.is_invalid = failure.status in INVALID
            retries = f" (after {outcome.n_retries} retries)" if outcome.n_retries else ""
            outcome.error = f"{failure}{retries}"
        outcome.elapsed_s = time.perf_counter() - started

    async def _wait(self, pause_s: float, outcome: Outcome) -> None:
        """Sleep, and say so now and then where it is long; what waits together says it once."""
        until_s = time.perf_counter() + pause_s
        while (left_s := until_s - time.perf_counter()) > 0:
            now_s = time.perf_counter()
            if pause_s >= REPORTED_PAUSE_S and now_s - self._said_s >= REPORT_INTERVAL_S:
                self._said_s = now_s
                self._say(
                    f"waiting {left_s:.0f} s before retry {outcome.n_retries} of "
                    f"{self._n_retries}: {outcome.retried_after}"
                )
            await asyncio.sleep(min(left_s, REPORT_INTERVAL_S))

    async def _ask_once(self, body: Body, max_tokens: int) -> Answer:
        answer = Answer(sent_s=time.perf_counter())
        body = {**body, **self._extra_body}
        first: Event = {}

        def take(event: Event, at_s: float) -> None:
            nonlocal first
            first = first or event
            answer.add(self._dialect.read(event), at_s)

        max_bytes = BYTES_PER_ANSWER + BYTES_PER_TOKEN * max_tokens
        try:
            receipt = await self._transport.stream(self._url, body, max_bytes, take)
        except RecursionError:
            raise RequestFailure("an event of another shape: it is nested too deeply") from None
        answer.connection, answer.is_cached = receipt.connection, receipt.is_cached
        redactor = self._transport.redactor
        said = receipt.stray
        if answer.is_blank and not said:
            said = snippet(json.dumps(first).encode(), redactor)
        answer.close(redactor, is_whole=receipt.is_whole, stray=receipt.stray, said=said)
        return answer


def check_whole(
    max_tokens: int, compared: Compared, *, counts_tokens: bool, says_end: bool
) -> Callable[[Answer], None]:
    """What `Client.ask` checks of an answer that is measured.

    ``says_end``: every answer has said how its completion ended.
    """

    def check(answer: Answer) -> None:
        # Gateways end a stream in form where the server behind them broke off.
        if says_end and not answer.is_end and answer.n_tokens is None:
            raise RequestFailure(
                "the stream ended without a finish_reason, which it had when probed: it was cut off"
            )
        answer.check(max_tokens, compared, counts_tokens=counts_tokens)

    return check
