"""Samples from a running server: a trial is one set of requests in flight together."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from ndcheck.errors import BackendError, TrialError, UsageError
from ndcheck.load import Arrival, filler_text, parse_arrival
from ndcheck.records import (
    CacheState,
    Decoding,
    Endpoint,
    Fault,
    Load,
    Probe,
    RunSpec,
    Sample,
    Trial,
    Witness,
)
from ndcheck.samplers.endpoint import prefix_cache
from ndcheck.samplers.endpoint.answer import Answer, RequestFailure
from ndcheck.samplers.endpoint.arrivals import run_trial
from ndcheck.samplers.endpoint.capabilities import (
    FP32_DIGITS,
    UNKNOWN_CONTEXT,
    Capabilities,
    identify,
    list_models,
    probe,
)
from ndcheck.samplers.endpoint.client import Client, Outcome
from ndcheck.samplers.endpoint.credentials import request_headers
from ndcheck.samplers.endpoint.dialects import Body, Chat, Completions, Dialect, Generate
from ndcheck.samplers.endpoint.prefix_cache import PrefixCache
from ndcheck.samplers.endpoint.transport import Transport
from ndcheck.samplers.endpoint.witness import (
    CLIENT_OVERLAP,
    MetricsWitness,
    find_gauge,
    overlap,
)

N_PROBING_TOKENS = 4
IDENTITY_TIMEOUT_S = 5.0
T = TypeVar("T")


class EndpointSampler:
    """Drives a server through its OpenAI API (SGLang: its own, which gives token ids).

    Opening it probes the server with short requests for the first probe. Raises UsageError where
    the server refuses what is asked, BackendError where it cannot be reached or fails.
    """

    interleaves_arms = True
    refused_axes = ()

    def __init__(self, spec: RunSpec, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        self._spec = spec
        self._endpoint = endpoint
        self._arrival = parse_arrival(endpoint.arrival) or Arrival("together")
        self._runner = asyncio.Runner()
        self._transport = Transport(
            endpoint.url,
            request_headers(endpoint, headers),
            endpoint.timeout_s,
        )
        self._fingerprints: list[str] = []
        try:
            self._run(self._open())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._run(self._transport.close())
        self._runner.close()

    @property
    def context(self) -> int:
        return self._identity.context or UNKNOWN_CONTEXT

    @property
    def cache_states(self) -> tuple[CacheState, ...]:
        return ("prefix",) if self._cache else ()

    @property
    def notes(self) -> tuple[str, ...]:
        seen = self._capabilities
        version = f" {self._identity.version}" if self._identity.version else ""
        digits = seen.logprob_digits
        logprobs = "no logprobs"
        if digits is not None:
            logprobs = f"logprobs of {digits} digits"
            if digits < FP32_DIGITS:
                logprobs += " (rounded: smaller differences cannot be seen)"
        cache = self._cache.how if self._cache else "no control that could be seen to work"
        return (
            f"{self._identity.server}{version} at {self._transport.base}",
            f"compared: {seen.compared}, {logprobs}",
            f"optional fields: {seen.seen}",
            f"batch size from: {self._witness_name}; prefix cache: {cache}",
        )

    def count_tokens(self, prompt: str) -> int:
        """By the server's own count; in words where it does not say."""
        answer = self._run(self._ask_for_probing(prompt, 1, {}))
        counted = answer.n_prompt_tokens
        return len(prompt.split()) if counted is None else counted

    def describe(self) -> dict[str, Any]:
        identity, seen = self._identity, self._capabilities
        return {
            "name": self._spec.model,
            "endpoint": self._transport.base,
            "server": identity.server,
            "version": identity.version,
            "served": identity.model,
            "system_fingerprint": seen.fingerprint,
            "compared": seen.compared,
            "logprob_digits": seen.logprob_digits,
            "optional_fields": seen.seen,
            "witness": self._witness_name,
            "prefix_cache": self._cache.how if self._cache else None,
            "digest": identity.digest(seen.fingerprint, seen.compared),
        }

    def largest_batch_size(self, n_prompt_tokens: int, decoding: Decoding) -> int:
        raise UsageError("--loads auto: with --endpoint the memory is the server's: give numbers")

    def changes(self) -> tuple[str, ...]:
        found = [
            f"the server's system_fingerprint changed in mid-run: {self._fingerprints[0]!r}, "
            f"then {fingerprint!r}"
            for fingerprint in self._fingerprints[1:]
        ]
        try:
            now = self._run(self._identify_quickly())
        except (RequestFailure, TimeoutError):
            return tuple(found)
        if now.digest() != self._identity.digest():
            before = (self._identity.server, self._identity.version, self._identity.model)
            found.append(
                "the server changed in mid-run: "
                f"{_listed(before)}, then {_listed((now.server, now.version, now.model))}"
            )
        return tuple(found)

    def sample(self, trial: Trial, probe: Probe, decoding: Decoding) -> list[Sample]:
        try:
            outcomes, achieved = self._run(self._sample(trial, probe, decoding))
        except RequestFailure as failure:  # of a request that prepares the trial
            if failure.is_unreachable:
                raise BackendError(f"the server is gone: {failure}") from failure
            raise TrialError(str(failure)) from failure
        return [
            self._make_sample(trial, nth, outcome, Witness(achieved))
            for nth, outcome in enumerate(outcomes)
        ]

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    async def _open(self) -> None:
        """Find out who answers and what it can do."""
        try:
            self._identity = await identify(self._transport, self._spec.model)
            gauge = await find_gauge(self._transport)
            self._metrics = MetricsWitness(self._transport, gauge) if gauge else None
            self._witness_name = gauge or CLIENT_OVERLAP
            api = Chat if self._spec.chat else Completions
            self._dialect: Dialect = api(streamed=gauge is None)
            if self._identity.server == "SGLang" and gauge and not self._spec.chat:
                self._dialect = Generate()
            self._client = Client(self._transport, self._dialect, self._endpoint.n_retries)
            prompt = self._spec.probes[0].prompt
            n_tokens = min(N_PROBING_TOKENS, self._spec.decoding.max_tokens)

            async def ask(fields: Body) -> Answer:
                return await self._ask_for_probing(prompt, n_tokens, fields)

            self._capabilities = await self._probe(ask)
            if self._spec.decoding.temperature and "seed" not in self._capabilities.accepted:
                raise UsageError(
                    f"--temperature {self._spec.decoding.temperature:g}: this server takes no "
                    "seed, so its draws differ by design: give 0"
                )
            self._cache: PrefixCache | None = await prefix_cache.find(
                self._identity.server,
                self._transport,
                lambda fields: ask({**self._capabilities.probe_fields, **fields}),
            )
        except RequestFailure as failure:
            raise BackendError(f"--endpoint {self._transport.base}: {failure}") from failure

    async def _probe(self, ask: Any) -> Capabilities:
        try:
            return await probe(self._dialect, ask)
        except RequestFailure as failure:
            if self._dialect.take_hint(str(failure)):
                return await self._probe(ask)
            if failure.status is None or not 400 <= failure.status < 500 or failure.is_temporary:
                raise
            names = await list_models(self._transport)
            hints = [f"it offers {', '.join(map(repr, names[:8]))}"] if names else []
            is_served = not names or self._spec.model in names
            if failure.status == 404 and not self._transport.base.endswith("/v1"):
                hints.append("most servers have their API under /v1")
            elif failure.status == 404 and is_served and not self._spec.chat:
                hints.append("a server with chat alone needs --chat")
            if failure.status in (401, 403):
                hints.append("the key is read from NDCHECK_API_KEY or --api-key-file")
            hint = f" ({'; '.join(hints)})" if hints else ""
            raise UsageError(
                f"--endpoint {self._transport.base} --model {self._spec.model}: {failure}{hint}"
            ) from failure

    async def _identify_quickly(self) -> Any:
        async with asyncio.timeout(IDENTITY_TIMEOUT_S):
            return await identify(self._transport, self._spec.model)

    async def _ask_for_probing(self, prompt: str, max_tokens: int, fields: Body) -> Answer:
        """A short request outside any trial, with the usual retries."""
        decoding = replace(self._spec.decoding, max_tokens=max_tokens)
        body = self._dialect.body(self._spec.model, prompt, max_tokens, decoding)
        return await self._client.ask({**body, **fields}, max_tokens)

    async def _sample(
        self, trial: Trial, probe: Probe, decoding: Decoding
    ) -> tuple[list[Outcome], int | None]:
        load = trial.load
        outcomes = [Outcome() for _ in load.slots]
        fillers: list[Outcome] = []
        rng = random.Random(f"{load.filler_seed}/{load.batch_size}/fillers")
        lengths = dict(
            zip(
                (row for row in range(load.batch_size) if row not in load.slots),
                load.filler_lengths,
                strict=True,
            )
        )

        async def send_probe(index: int) -> None:
            body = self._dialect.body(self._spec.model, probe.prompt, decoding.max_tokens, decoding)
            body |= self._capabilities.probe_fields
            if "seed" in self._capabilities.accepted:
                body["seed"] = decoding.seed
            if self._cache:
                body |= self._cache.fields(load.cache_state, trial.trial_id, index)
            compared = self._capabilities.compared
            await self._client.record(body, decoding.max_tokens, compared, outcomes[index])

        async def send_filler(row: int, number: int) -> None:
            length = lengths.get(row, probe.prompt.count(" ") + 1)
            seed = load.filler_seed + row + number * load.batch_size
            prompt = filler_text(seed, length)
            if self._endpoint.fillers == "shared-prefix":
                prompt = f"{probe.prompt} {prompt}"
            n_tokens = decoding.max_tokens
            if self._arrival.kind == "closed":
                n_tokens = rng.randint(max(1, n_tokens // 4), n_tokens)
            body = self._dialect.body(self._spec.model, prompt, n_tokens, decoding)
            body |= self._capabilities.filler_fields
            fillers.append(Outcome())
            await self._client.record(body, n_tokens, "text", fillers[-1])

        if self._cache and load.cache_state == "prefix":
            await self._cache.warm(
                lambda fields: self._ask_for_probing(
                    probe.prompt, 1, {**self._capabilities.probe_fields, **fields}
                ),
                trial.trial_id,
            )
        elif self._cache:
            await self._cache.cool()
        senders = [lambda i=i: send_probe(i) for i in range(len(outcomes))]
        async with self._metrics.watching(load.batch_size) if self._metrics else nullcontext():
            await run_trial(load, self._arrival, senders, send_filler)
        await self._judge(trial, outcomes, fillers)
        answers = [o.answer for o in (*outcomes, *fillers) if o.answer is not None]
        return outcomes, self._achieved(load, answers)

    def _achieved(self, load: Load, answers: list[Answer]) -> int | None:
        if load.batch_size == 1 and answers:
            # Nothing else was sent; others' requests show in the server's metrics only.
            return max(1, self._metrics.peak or 1) if self._metrics else 1
        return self._metrics.peak if self._metrics else overlap(answers)

    async def _judge(self, trial: Trial, outcomes: list[Outcome], fillers: list[Outcome]) -> None:
        """Turn what happened beside a request into its error.

        Raises BackendError where the server is gone, fails every request, or fails the reference.
        """
        load = trial.load
        for outcome in (*outcomes, *fillers):
            if outcome.is_unreachable:
                raise BackendError(f"the server is gone: {outcome.error}")
        failed_fillers = [f.error for f in fillers if f.error is not None]
        for outcome in outcomes:
            if outcome.error is None and failed_fillers:
                outcome.error = f"a filler of its batch failed: {failed_fillers[0]}"
            elif outcome.error is None and outcome.n_retries and load.batch_size > 1:
                outcome.error = (
                    f"answered only on retry {outcome.n_retries}, outside the batch asked for: "
                    f"{outcome.retried_after}"
                )
            self._note_fingerprint(outcome.answer)
        cached = [o.answer.n_cached_tokens for o in outcomes if o.answer is not None]
        if load.cache_state == "prefix" and cached and not any(cached):
            for outcome in outcomes:
                outcome.error = outcome.error or "the prefix cache was not hit, though warmed"
        errors = [o.error for o in outcomes if o.answer is None]
        if len(errors) < len(outcomes):
            return
        if trial.axis == "reference" and trial.baseline is None:
            raise BackendError(f"the reference of probe {trial.probe_id} failed: {errors[0]}")
        await self._require_life()

    async def _require_life(self) -> None:
        """Raise BackendError unless the server still answers a short request."""
        for attempts_left in range(self._endpoint.n_retries, -1, -1):
            try:
                await self._ask_for_probing(self._spec.probes[0].prompt, 1, {})
            except RequestFailure as failure:
                if not attempts_left:
                    raise BackendError(f"the server no longer answers: {failure}") from failure
            else:
                return

    def _note_fingerprint(self, answer: Answer | None) -> None:
        seen = self._capabilities.fingerprint
        if answer is None or answer.fingerprint is None:
            return
        for fingerprint in (seen, answer.fingerprint):
            if fingerprint is not None and fingerprint not in self._fingerprints:
                self._fingerprints.append(fingerprint)

    def _make_sample(self, trial: Trial, nth: int, outcome: Outcome, witness: Witness) -> Sample:
        answer = outcome.answer if outcome.error is None else None
        token_ids: tuple[int, ...] = ()
        token_texts: tuple[str, ...] = ()
        logprobs: tuple[float, ...] = ()
        if answer is not None:
            token_ids, token_texts = answer.stream(self._capabilities.compared)
            logprobs = tuple(answer.logprobs) if len(answer.logprobs) == len(token_ids) else ()
            if trial.fault is not None:
                token_ids, logprobs = plant(token_ids, logprobs, trial.fault)
        return Sample.of(
            trial,
            nth,
            witness,
            (answer and answer.finish_reason) or "error",
            outcome.elapsed_s,
            token_ids=token_ids,
            token_texts=token_texts,
            logprobs=logprobs,
            margins=tuple(answer.margins) if answer is not None and logprobs else (),
            error=outcome.error,
            n_retries=outcome.n_retries,
        )


def plant(
    token_ids: tuple[int, ...], logprobs: tuple[float, ...], fault: Fault
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The control: a server's logits are out of reach, so the received stream gets the fault."""
    ids = list(token_ids)
    if fault.fork_at < len(ids):
        ids[fault.fork_at] ^= 1
    bits = list(logprobs)
    if fault.latent_at < len(bits):
        # A few units in the last place of fp32, whichever way a double is rounded to it.
        bits[fault.latent_at] = bits[fault.latent_at] * (1 + 2**-21) - 2**-40
    return tuple(ids), tuple(bits)


def _listed(facts: tuple[str | None, ...]) -> str:
    return " ".join(repr(fact) for fact in facts if fact)
