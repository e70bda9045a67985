"""Cold and warm prefixes, where a server lets a client choose and shows which it was."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ndcheck.records import CacheState
from ndcheck.samplers.endpoint.answers.answer import Answer
from ndcheck.samplers.endpoint.answers.dialects import Body
from ndcheck.samplers.endpoint.answers.event_stream import RequestFailure
from ndcheck.samplers.endpoint.transport import Transport

Ask = Callable[[Body], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """The switch that a kind of server has; ``how`` names it.

    ``nonce`` is this process's own: what an earlier run left in the cache must not be hit.
    """

    how: str
    transport: Transport
    nonce: str

    def fields(self, state: CacheState, trial_id: int, index: int) -> Body:
        """What the request of a trial's ``index``-th probe says of the cache."""
        if self.how == "cache_salt":
            salt = f"{self.nonce}-{trial_id}"
            return {"cache_salt": salt if state == "prefix" else f"{salt}-{index}"}
        if self.how == "cache_prompt":
            return {"cache_prompt": state == "prefix"}
        return {}

    async def warm(self, ask: Ask, trial_id: int) -> None:
        """Compute the prompt beforehand."""
        await ask(self.fields("prefix", trial_id, 0))

    async def cool(self) -> None:
        """Forget what was computed before, where that takes a request of its own."""
        if self.how == "flush_cache":
            await self.transport.get(f"{self.transport.root}/flush_cache")


SWITCHES = {"vLLM": "cache_salt", "llama.cpp": "cache_prompt", "SGLang": "flush_cache"}


async def find(server: str, transport: Transport, ask: Ask) -> PrefixCache | None:
    """The server's switch if it is seen to work on the first probe, else None.

    Seen: the server counts no cached token when cold, and some when warm.
    """
    how = SWITCHES.get(server)
    if how is None:
        return None
    cache = PrefixCache(how, transport, uuid.uuid4().hex)
    try:
        await cache.cool()
        cold = await ask(cache.fields("whole", -1, 0))
        await cache.warm(ask, -1)
        warm = await ask(cache.fields("prefix", -1, 0))
    except RequestFailure as failure:
        if failure.is_unreachable:
            raise
        return None
    return cache if not cold.n_cached_tokens and warm.n_cached_tokens else None
