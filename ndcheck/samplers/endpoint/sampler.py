"""Samples from a running server: a trial is one set of requests in flight together."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from ndcheck.errors import BackendError, TrialError, UsageError
from ndcheck.plan.arrivals import parse_arrivals
from ndcheck.plan.conversations import as_text, continued
from ndcheck.plan.faults import plant_in_stream
from ndcheck.plan.fillers import filler_text
from ndcheck.probe import Prompt
from ndcheck.records import (
    CacheState,
    Decoding,
    Endpoint,
    Load,
    Probe,
    RunSpec,
    Sample,
    Trial,
    Witness,
)
from ndcheck.samplers.base import NOT_FED
from ndcheck.samplers.endpoint.answers.dialects import outlasting
from ndcheck.samplers.endpoint.answers.event_stream import RequestFailure
from ndcheck.samplers.endpoint.answers.renaming import FirstNames
from ndcheck.samplers.endpoint.answers.rounding import FirstDigits
from ndcheck.samplers.endpoint.arrivals import run_trial
from ndcheck.samplers.endpoint.capabilities import FP32_DIGITS
from ndcheck.samplers.endpoint.changes import Changes
from ndcheck.samplers.endpoint.client import Outcome
from ndcheck.samplers.endpoint.credentials import request_body, request_headers, request_query
from ndcheck.samplers.endpoint.identity import Identity, identify
from ndcheck.samplers.endpoint.opening import open_server
from ndcheck.samplers.endpoint.private import Private, query_secrets, secrets_of
from ndcheck.samplers.endpoint.transport import Transport
from ndcheck.samplers.endpoint.witness import (
    Stream,
    batch_sizes_read,
    batch_sizes_seen,
    even_steps,
    find_streams,
    held_to_streams,
    most_of_the_time,
)
from ndcheck.samplers.event_loop import EventLoop

UNKNOWN_CONTEXT = 1 << 20
IDENTITY_TIMEOUT_S = 5.0
COMPARED = {
    "token ids": "token ids and text",
    "logprob tokens": "token names and text",
    "text": "text",
}


class EndpointSampler:
    """Drives a server through its OpenAI API (SGLang: its own, which gives token ids).

    Opening it probes the server with short requests for the first probe. Raises UsageError where
    the server refuses what is asked, BackendError where it cannot be reached or fails.
    """

    interleaves_arms = True
    refused_axes = NOT_FED

    def __init__(
        self,
        spec: RunSpec,
        endpoint: Endpoint,
        private: Private,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``say`` is told what takes long: a server that asks to wait."""
        self._spec = spec
        self._endpoint = endpoint
        self._arrivals = parse_arrivals(endpoint.arrival, "s")
        self._loop = EventLoop()
        self._run = self._loop.run
        query = request_query(endpoint, private.query)
        extra_body = request_body(endpoint, private.extra_body)
        self._transport = Transport(
            endpoint.url,
            request_headers(endpoint, private.headers),
            endpoint.timeout_s,
            query,
            (*query_secrets(query, endpoint.query), *secrets_of(extra_body)),
        )
        self._lacks_room = False
        self._prompt_ids: dict[Prompt, list[int]] = {}
        self._changes = Changes(self._prompt_ids)
        self._first_names, self._first_digits = FirstNames(), FirstDigits()
        try:
            self._server = self._run(open_server(spec, endpoint, self._transport, extra_body, say))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._run(self._transport.close())
        self._loop.close()

    @property
    def context(self) -> int:
        return self._server.identity.context or UNKNOWN_CONTEXT

    @property
    def cache_states(self) -> tuple[CacheState, ...]:
        return ("prefix",) if self._server.cache else ()

    @property
    def notes(self) -> tuple[str, ...]:
        seen = self._server.capabilities
        version = f" {self._server.identity.version}" if self._server.identity.version else ""
        digits = seen.logprob_digits
        logprobs = "no logprobs"
        if digits is not None:
            logprobs = f"logprobs of {digits} digits"
            if digits < FP32_DIGITS:
                logprobs += " (rounded: smaller differences cannot be seen)"
        cache = (
            self._server.cache.how
            if self._server.cache
            else "no control that could be seen to work"
        )
        other = seen.served if seen.served != self._spec.model else ""
        return (
            f"{self._server.identity.server}{version} at {self._transport.base}"
            f"{f', whose answers name {other!r}' if other else ''}",
            f"compared: {COMPARED[seen.compared]}, {logprobs}",
            f"optional fields: {seen.seen}",
            f"batch size from: {self._server.witness_name}; prefix cache: {cache}",
        )

    def count_tokens(self, prompt: Prompt) -> int:
        """By the server's own count; in words where it does not say."""
        fields = self._server.capabilities.accepted.get("token ids", {})
        answer = self._run(self._server.ask_briefly(prompt, 1, fields))
        self._prompt_ids[prompt] = answer.prompt_token_ids
        counted = answer.n_prompt_tokens
        return len(as_text(prompt).split()) if counted is None else counted

    def encode(self, prompt: Prompt) -> list[int] | None:
        return self._prompt_ids.get(prompt) or None

    def render(self, prompt: Prompt) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        identity, seen = self._server.identity, self._server.capabilities
        return {
            "name": self._spec.model,
            "endpoint": self._transport.base,
            "server": identity.server,
            "version": identity.version,
            "served": identity.model,
            "system_fingerprint": seen.fingerprint or None,
            "answered_by": seen.served or None,
            "compared": seen.compared,
            "logprob_digits": seen.logprob_digits,
            "optional_fields": seen.seen,
            "witness": self._server.witness_name,
            "prefix_cache": self._server.cache.how if self._server.cache else None,
            "digest": identity.digest(seen.fingerprint, seen.compared),
        }

    def largest_batch_size(self, n_prompt_tokens: int, decoding: Decoding) -> int:
        raise UsageError("--loads auto: with --endpoint the memory is the server's: give numbers")

    def changes(self) -> tuple[str, ...]:
        n_others = self._server.n_other_beginnings
        draws = self._endpoint.omits_temperature or self._spec.decoding.temperature > 0
        bits_count = not self._spec.allow_latent
        found = [*self._changes.sentences(n_others, bits_count=bits_count, draws=draws)]
        try:
            now = self._run(self._identify_quickly())
        except (RequestFailure, TimeoutError):
            return tuple(found)
        if now.digest() != self._server.identity.digest():
            before = (
                self._server.identity.server,
                self._server.identity.version,
                self._server.identity.model,
            )
            found.append(
                "the server changed in mid-run: "
                f"{_listed(before)}, then {_listed((now.server, now.version, now.model))}"
            )
        return tuple(found)

    def sample(self, trial: Trial, probe: Probe, decoding: Decoding) -> list[Sample]:
        try:
            outcomes, sizes = self._run(self._sample(trial, probe, decoding))
        except RequestFailure as failure:  # of a request that prepares the trial
            if failure.is_unreachable:
                raise BackendError(f"the server is gone: {failure}") from failure
            raise TrialError(str(failure)) from failure
        for index, each in enumerate(outcomes):
            if each.answer is not None:
                self._changes.add(probe.content, each.answer, is_streamed=self._streams(index))
        reached = [most_of_the_time(of_row) for of_row in sizes]
        known = [size for size in reached if size is not None]
        achieved = min(known) if len(known) == len(reached) else None
        return [
            self._make_sample(trial, nth, outcome, self._make_witness(outcome, achieved, of_row))
            for nth, (outcome, of_row) in enumerate(zip(outcomes, sizes, strict=True))
        ]

    def _streams(self, nth: int) -> bool:
        """Is the ``nth`` row of a trial asked for a stream?"""
        return nth < self._server.n_streamed

    async def _identify_quickly(self) -> Identity:
        async with asyncio.timeout(IDENTITY_TIMEOUT_S):
            return await identify(self._transport, self._spec.model)

    async def _sample(
        self, trial: Trial, probe: Probe, decoding: Decoding
    ) -> tuple[list[Outcome], list[list[int]]]:
        """What became of each of the trial's probes, and the batch at each of its tokens."""
        load, seen = trial.load, self._server.capabilities
        outcomes = [Outcome() for _ in load.slots]
        fillers: list[Outcome] = []
        rng = random.Random(f"{load.filler_seed}/{load.batch_size}/fillers")
        rows = [row for row in range(load.batch_size) if row not in load.slots]
        lengths = dict(zip(rows, load.filler_lengths, strict=True))

        async def send_probe(index: int) -> None:
            body = self._server.body(probe.content, streamed=self._streams(index))
            if self._server.cache:
                body |= self._server.cache.fields(load.cache_state, trial.trial_id, index)
            await self._server.client.record(
                body, decoding.max_tokens, self._server.check, outcomes[index]
            )

        async def send_filler(row: int, number: int) -> bool:
            length = lengths.get(row, as_text(probe.content).count(" ") + 1)
            words = filler_text(load.filler_seed + row + number * load.batch_size, length)
            is_shared = self._endpoint.fillers == "shared-prefix"
            prompt = continued(probe.content, words) if is_shared else words
            n_tokens = outlasting(decoding.max_tokens)
            if number or self._arrivals.kind == "closed":
                least = max(self._server.dialect.least_tokens, decoding.max_tokens // 4)
                n_tokens = rng.randint(least, decoding.max_tokens)
            elif self._lacks_room or 2 * length + n_tokens > self.context:
                n_tokens = decoding.max_tokens
            streamed = self._streams(len(load.slots) + (*rows, row).index(row))
            make_body, model = self._server.dialect.body, self._spec.model
            fillers.append(outcome := Outcome())
            while True:
                body = make_body(model, prompt, n_tokens, decoding, streamed=streamed)
                body |= seen.filler_fields(n_tokens)
                await self._server.client.record(body, n_tokens, lambda answer: None, outcome)
                if not outcome.is_invalid or n_tokens <= decoding.max_tokens:
                    return outcome.error is None
                # There is room for the probe, and for no token after it.
                self._lacks_room, n_tokens = True, decoding.max_tokens
                outcome.error, outcome.is_invalid = None, False

        if self._server.cache and load.cache_state == "prefix":
            await self._server.cache.warm(
                lambda fields: self._server.ask_briefly(
                    probe.content, 1, {**seen.probe_fields, **fields}
                ),
                trial.trial_id,
            )
        elif self._server.cache:
            await self._server.cache.cool()
        senders = [lambda i=i: send_probe(i) for i in range(len(outcomes))]
        async with (
            self._server.metrics.watching(load.batch_size)
            if self._server.metrics
            else nullcontext()
        ):
            await run_trial(load, self._arrivals, senders, send_filler)
        await self._judge(trial, outcomes, fillers)
        answers = [o.answer for o in (*outcomes, *fillers) if o.answer is not None]
        self._server = await self._server.timed_again(answers)
        streams = find_streams(answers)
        return outcomes, [self._find_sizes(load, outcome, streams) for outcome in outcomes]

    def _find_sizes(self, load: Load, outcome: Outcome, streams: Sequence[Stream]) -> list[int]:
        """The batch at each token of the probe's answer; empty where it cannot be known."""
        if outcome.answer is None:
            return []
        compared = self._server.capabilities.compared
        n_units = len(outcome.answer.stream(compared)[0])
        times_s = outcome.answer.unit_times_s(compared, n_units)
        if self._server.metrics is not None:
            if outcome.answer.came_at_once:
                times_s = even_steps(n_units, outcome.answer.sent_s, outcome.answer.last_s, streams)
            sizes = batch_sizes_read(times_s, self._server.metrics.readings)
            are_together = self._arrivals.kind == "together"
            sizes = held_to_streams(
                sizes, times_s, streams, load.batch_size, are_together=are_together
            )
            if sizes or load.batch_size > 1:
                return sizes
        if load.batch_size == 1:
            return [1] * n_units  # Nothing else was sent; others' requests were not seen.
        return [] if outcome.answer.came_at_once else batch_sizes_seen(times_s, streams)

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
        cached = [o.answer.n_cached_tokens for o in outcomes if o.answer is not None]
        if load.cache_state == "prefix" and cached and not any(cached):
            for outcome in outcomes:
                outcome.error = outcome.error or "the prefix cache was not hit, though warmed"
        errors = [o.error for o in outcomes if o.answer is None]
        if len(errors) < len(outcomes):
            return
        if trial.role == "reference" and trial.baseline is None:
            raise BackendError(f"the reference of probe {trial.probe_id} failed: {errors[0]}")
        await self._require_life()

    async def _require_life(self) -> None:
        """Raise BackendError unless the server still answers a short request."""
        for attempts_left in range(self._endpoint.n_retries, -1, -1):
            try:
                await self._server.ask_briefly(self._spec.probes[0].content, 1, {})
            except RequestFailure as failure:
                if not attempts_left:
                    raise BackendError(f"the server no longer answers: {failure}") from failure
            else:
                return

    def _make_witness(
        self, outcome: Outcome, achieved: int | None, sizes: Sequence[int]
    ) -> Witness:
        answer, seen = outcome.answer, self._server.capabilities
        if answer is None:
            return Witness(achieved)
        return Witness(
            achieved,
            step_batch_sizes=tuple(sizes),
            connection=answer.connection,
            response_id=answer.response_id if seen.has_ids else "",
            fingerprint=answer.fingerprint,
            n_prompt_tokens=answer.n_prompt_tokens,
            # Of some tokens alone they may be those of other tokens each time.
            names_digest=answer.names_digest if seen.compared != "text" else "",
            beside=answer.beside_digest,
            n_counted=answer.n_tokens if seen.counts_tokens else None,
            is_replayed=answer.is_cached or seen.came_too_soon(answer),
        )

    def _make_sample(self, trial: Trial, nth: int, outcome: Outcome, witness: Witness) -> Sample:
        answer = outcome.answer if outcome.error is None else None
        token_ids: tuple[int, ...] = ()
        token_texts: tuple[str, ...] = ()
        logprobs: tuple[float, ...] = ()
        if answer is not None:
            seen = self._server.capabilities
            token_ids, token_texts = self._first_names.stream(answer, seen.compared)
            # Where text is compared, some tokens alone have one, if any: they have no place in it.
            has_bits = "logprobs" in seen.accepted and seen.compared != "text"
            if has_bits and len(answer.logprobs) == len(token_ids):
                logprobs = answer.logprobs
            self._changes.n_without_bits += has_bits and not logprobs
            if logprobs and self._first_digits.are_other(trial.probe_id, token_ids, logprobs):
                self._changes.n_rounded, logprobs = self._changes.n_rounded + 1, ()
            token_ids, logprobs = plant_in_stream(token_ids, logprobs, trial.fault)
        finish_reason = (answer and answer.finish_reason) or "error"
        return replace(
            Sample.of(trial, nth, witness, finish_reason, outcome.elapsed_s),
            token_ids=token_ids,
            token_texts=token_texts,
            logprobs=logprobs,
            margins=answer.margins if answer is not None and logprobs else (),
            row_digests=answer.row_digests if answer is not None and logprobs else (),
            error=outcome.error,
            n_retries=outcome.n_retries,
        )


def _listed(facts: tuple[str | None, ...]) -> str:
    return " ".join(repr(fact) for fact in facts if fact)
