"""Cold and warm prefixes, where a server lets a client choose and shows which it was."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ndcheck.records import CacheState
from ndcheck.samplers.endpoint.answer import Answer, RequestFailure
from ndcheck.samplers.endpoint.dialects import Body
from ndcheck.samplers.endpoint.transport import Transport

Ask = Callable[[Body], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """The switch that a kind of server has; ``how`` names it."""

    how: str
    transport: Transport

    def fields(self, state: CacheState, salt: str, index: int) -> Body:
        """What a probe's request says of the cache; ``salt`` is the trial's own."""
        if self.how == "cache_salt":
            return {"cache_salt": salt if state == "prefix" else f"{salt}-{index}"}
        if self.how == "cache_prompt":
            return {"cache_prompt": state == "prefix"}
        return {}

    async def warm(self, ask: Ask, salt: str) -> None:
        """Compute the prompt beforehand."""
        await ask(self.fields("prefix", salt, 0))

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
    cache = PrefixCache(how, transport)
    try:
        await cache.cool()
        cold = await ask(cache.fields("whole", "ndcheck-cold", 0))
        await cache.warm(ask, "ndcheck-warm")
        warm = await ask(cache.fields("prefix", "ndcheck-warm", 0))
    except RequestFailure as failure:
        if failure.is_unreachable:
            raise
        return None
    return cache if not cold.n_cached_tokens and warm.n_cached_tokens else None
