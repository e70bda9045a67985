"""Continuous batching over scripted streams: every step gives each running request a token."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from ndcheck.records import Decoding, Load, Probe, Sample, Trial
from ndcheck.samplers.scripted.sampler import FORK_AT, LATENT_AT, ScriptedSampler

N_REPLICAS = 3
GATHER_S = 0.01
LONGEST_HOLD_S = 0.5
_CLEAN, _FORK, _LATENT = (ScriptedSampler(name) for name in ("clean", "fork", "latent"))


@dataclass(slots=True)
class Token:
    """One generated token."""

    token_id: int
    text: str
    logprob: float
    margin: float


@dataclass(slots=True, eq=False)
class ServedRequest:
    """What runs: ``replica`` counts from 0, ``is_cached`` is decided when it is admitted."""

    prompt: str
    max_tokens: int
    seed: int
    cache_key: str | None
    replica: int
    is_cached: bool = False
    tokens: asyncio.Queue[Token] = field(default_factory=asyncio.Queue)
    n_done: int = 0
    forked: bool = False


class ScriptedEngine:
    """At most ``max_batch`` requests run; a step takes ``step_s`` seconds.

    An idle engine waits a little for requests that were sent together. With ``is_polled`` it also
    holds a new batch until somebody has looked at its size, so that what a poll sees does not
    depend on the speed of the machine.
    """

    def __init__(self, fault: str, max_batch: int, step_s: float, *, is_polled: bool) -> None:
        self._fault = fault
        self._max_batch = 1 if fault == "never-batches" else max_batch
        self._step_s = step_s
        self._waiting: list[ServedRequest] = []
        self._running: list[ServedRequest] = []
        self._cached: set[str] = set()
        self._numbers = itertools.count()
        self._work = asyncio.Event()
        self._is_polled = is_polled
        self._seen = asyncio.Event()

    def poll(self) -> int:
        """How many requests run."""
        self._seen.set()
        return len(self._running)

    def flush_cache(self) -> None:
        self._cached.clear()

    async def generate(
        self, prompt: str, max_tokens: int, seed: int, cache_key: str | None
    ) -> AsyncIterator[tuple[ServedRequest, Token]]:
        """Tokens as they come; ``cache_key`` None neither reads nor fills the prefix cache."""
        request = ServedRequest(
            prompt, max_tokens, seed, cache_key, next(self._numbers) % N_REPLICAS
        )
        self._waiting.append(request)
        self._work.set()
        try:
            for _ in range(max_tokens):
                yield request, await request.tokens.get()
        finally:
            for queue in (self._waiting, self._running):
                if request in queue:
                    queue.remove(request)

    async def run(self) -> None:
        """Step for ever."""
        while True:
            if not self._waiting and not self._running:
                self._work.clear()
                await self._work.wait()
                await asyncio.sleep(GATHER_S)
            await asyncio.sleep(self._step_s)
            n_before = len(self._running)
            while self._waiting and len(self._running) < self._max_batch:
                self._admit(self._waiting.pop(0))
            if self._is_polled and len(self._running) > max(1, n_before):
                self._seen.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._seen.wait(), LONGEST_HOLD_S)
            n_running = len(self._running)
            for request in list(self._running):
                request.tokens.put_nowait(self._next_token(request, n_running))
                request.n_done += 1
                if request.n_done == request.max_tokens:
                    self._running.remove(request)

    def _admit(self, request: ServedRequest) -> None:
        if request.cache_key is not None:
            request.is_cached = request.cache_key in self._cached
            self._cached.add(request.cache_key)
        self._running.append(request)

    def _next_token(self, request: ServedRequest, n_running: int) -> Token:
        strikes = {
            "concurrency": n_running > 1,
            "latent": n_running > 1,
            "cache": request.is_cached,
            "replica": request.replica == N_REPLICAS - 1,
        }.get(self._fault, False)
        at = request.n_done
        if at == FORK_AT and strikes and self._fault != "latent":
            request.forked = True
        kind = "fork" if request.forked else "clean"
        if at == LATENT_AT and strikes and self._fault == "latent":
            kind = "latent"
        sample = scripted_stream(kind, request.prompt, request.max_tokens, request.seed)
        return Token(
            sample.token_ids[at], sample.token_texts[at], sample.logprobs[at], sample.margins[at]
        )


@functools.lru_cache(maxsize=4096)
def scripted_stream(kind: str, prompt: str, max_tokens: int, seed: int) -> Sample:
    """A scripted sampler's completion: ``clean``, ``fork`` or ``latent``."""
    sampler = {"clean": _CLEAN, "fork": _FORK, "latent": _LATENT}[kind]
    # These behaviours show after the first trial, and in batches.
    trial = Trial(1, "stock", "p1", "reference", Load(2), 0)
    (sample,) = sampler.sample(trial, Probe("p1", prompt), Decoding(max_tokens, seed=seed))
    return sample
