"""Before the first trial: who answers, in which dialect, and why it refuses if it does."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

from ndcheck.errors import BackendError, UsageError, doing
from ndcheck.plan.fillers import filler_text
from ndcheck.probe import Prompt
from ndcheck.records import Endpoint, RunSpec
from ndcheck.samplers.endpoint import prefix_cache
from ndcheck.samplers.endpoint.answers.answer import Answer
from ndcheck.samplers.endpoint.answers.dialects import Body, Chat, Completions, Dialect, Generate
from ndcheck.samplers.endpoint.answers.event_stream import RequestFailure
from ndcheck.samplers.endpoint.answers.events import as_dict, as_fact, as_list
from ndcheck.samplers.endpoint.answers.responses import Responses
from ndcheck.samplers.endpoint.capabilities import BUSY, Capabilities, probe
from ndcheck.samplers.endpoint.client import INVALID, Client, check_whole
from ndcheck.samplers.endpoint.identity import Identity, get_models, identify
from ndcheck.samplers.endpoint.prefix_cache import PrefixCache
from ndcheck.samplers.endpoint.transport import Transport
from ndcheck.samplers.endpoint.witness import (
    CLIENT_OVERLAP,
    N_STREAMED,
    MetricsWitness,
    find_gauge,
)
from ndcheck.storage.reading import parse_json

N_PROBING_TOKENS = 4
N_LIMITS = 5
LONGEST_LIMIT = 64
"""Tokens of the requests that differ in their limit only."""
N_TIMINGS = 3
MAX_TIMED_AGAIN = 3
MAX_OFFERED = 8
SMALL_TEMPERATURE = 0.001
NOT_THERE = (404, 405)
LARGEST_STEP = 20
"""Between the numbers of a server that counts its answers, which others may ask too."""
_OF_A_MODEL = re.compile(r"\bmodel\b|provider|parameters|polic")
"""What a refusal as not found speaks of, where the address is right."""
_SHORT_NUMBER = re.compile(r"(.*?)(\d{1,6})")


async def _explain(
    failure: RequestFailure, spec: RunSpec, endpoint: Endpoint, transport: Transport
) -> UsageError:
    """The refusal, with the options that may help against it."""
    words = str(failure).lower()
    names = [
        as_fact(as_dict(entry).get("id"))
        for entry in as_list((await get_models(transport)).get("data"))
    ]
    names = [name for name in names if name]
    hints = []
    is_unknown = bool(names) and spec.model not in names
    if is_unknown and (failure.status == 404 or "model" in words):
        offered = ", ".join(map(repr, names[:MAX_OFFERED]))
        more = f" and {len(names) - MAX_OFFERED} more" if len(names) > MAX_OFFERED else ""
        hints.append(f"it offers {offered}{more}")
    elif _lacks_version(words, endpoint, transport):
        hints.append("give its version with --query, such as --query api-version=2024-10-21")
    elif failure.status in NOT_THERE and not _OF_A_MODEL.search(words):
        hints.append(await _find_address(spec, transport, has_models=bool(names)))
    elif failure.status in (401, 403):
        hints.append(
            "the key is read from NDCHECK_API_KEY or --api-key-file and sent as a bearer token; "
            "for another header give --header 'api-key: VALUE'"
        )
    elif "temperature" in words and not endpoint.omits_temperature:
        hints.append(
            "--no-temperature leaves it out, and sampling to the server; where it takes a seed, "
            f"--temperature {SMALL_TEMPERATURE} leaves near-ties alone to chance"
        )
    elif "stop" in words and endpoint.stop:
        hints.append("this is what --stop asks for")
    elif named := _fields_named(words, endpoint):
        hints.append(f"--extra-body sends {', '.join(named)}")
    elif any(word in words for word in ("required", "missing", "must provide", "expected field")):
        hints.append("--extra-body adds a field, --header a header, --query a parameter")
    hint = f" ({'; '.join(filter(None, hints))})" if any(hints) else ""
    return UsageError(f"--endpoint {transport.base} --model {spec.model}: {failure}{hint}")


def _lacks_version(words: str, endpoint: Endpoint, transport: Transport) -> bool:
    """Is it Azure's way to address a model, without the version that it needs?"""
    is_azure = "api-version" in words or "api version" in words or "/deployments/" in transport.base
    return is_azure and not any(item.startswith("api-version") for item in endpoint.query)


def _fields_named(words: str, endpoint: Endpoint) -> list[str]:
    """The extra fields of requests that a refusal speaks of."""
    fields = parse_json(endpoint.extra_body) if endpoint.extra_body else {}
    return [name for name in fields if name.lower() in words]


async def _find_address(spec: RunSpec, transport: Transport, *, has_models: bool) -> str:
    """What is wrong with the address, as far as the server's own pages tell."""
    for path in ("/chat/completions", "/completions", "/responses", "/models"):
        if transport.base.endswith(path):
            return f"leave out {path}: ndcheck adds it"
    if has_models:
        return _other_way(spec)
    if "data" in await transport.get_object(f"{transport.base}/v1/models"):
        return f"its API is at {transport.base}/v1"
    if "v1" in transport.base.split("/"):
        return _other_way(spec)
    return "most servers have their API under /v1"


def _other_way(spec: RunSpec) -> str:
    if not spec.chat:
        return "a server with chat alone needs --chat"
    is_text = not any(probe.messages for probe in spec.probes)
    return "a server without chat takes prompts as they are: leave out --chat" if is_text else ""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers, and what was found out about it."""

    spec: RunSpec
    identity: Identity
    dialect: Dialect
    client: Client
    capabilities: Capabilities
    metrics: MetricsWitness | None
    cache: PrefixCache | None
    n_other_beginnings: int
    """Of completions that differ in their limit alone: how many begin unlike the first."""
    n_streamed: int = 0
    """Rows of a trial that are asked for streams: all of them have to be where that alone shows
    the batch, or where a completion in one piece is another."""
    n_timed_again: int = 0

    @property
    def witness_name(self) -> str:
        return self.metrics.name if self.metrics else CLIENT_OVERLAP

    def body(self, prompt: Prompt, *, streamed: bool) -> Body:
        """The request for a completion that is measured."""
        decoding, stop = self.spec.decoding, self.spec.endpoint and self.spec.endpoint.stop
        body = self.dialect.body(
            self.spec.model, prompt, decoding.max_tokens, decoding, streamed=streamed
        )
        body |= self.capabilities.probe_fields
        if stop:
            body["stop"] = list(stop)
        if not body["stream"]:
            body.pop("stream_options", None)
        if "seed" in self.capabilities.accepted:
            body["seed"] = decoding.seed
        return body

    @property
    def check(self) -> Callable[[Answer], None]:
        """What an answer to it has to be. Raises RequestFailure for another."""
        seen = self.capabilities
        # The tokens that a stop is made of may be counted without being sent.
        stops = self.spec.endpoint is not None and bool(self.spec.endpoint.stop)
        return check_whole(
            self.spec.decoding.max_tokens,
            seen.compared,
            counts_tokens=seen.counts_tokens and not stops,
            says_end=seen.says_end,
        )

    async def gives_the_same_whole(self) -> bool:
        """Is a completion in one piece what it is as a stream? Some are stripped, or hold less."""
        compared, said = self.capabilities.compared, set()
        for streamed in (True, False):
            body = self.body(self.spec.probes[0].content, streamed=streamed)
            try:
                answer = await self.client.ask(body, self.spec.decoding.max_tokens, self.check)
            except RequestFailure as failure:
                if failure.is_unreachable or failure.status in BUSY:
                    raise
                return False
            ended = answer.finish_reason, answer.names_digest, answer.beside_digest
            said.add((answer.stream(compared), answer.logprobs, answer.row_digests, ended))
        return len(said) == 1

    async def timed_again(self, answers: Sequence[Answer]) -> Server:
        """With first tokens as quick as they are now, where an answer came before one could.

        They may have been slow at first: others' load, a server that warmed up.
        """
        seen = self.capabilities
        if self.n_timed_again >= MAX_TIMED_AGAIN or not any(map(seen.came_too_soon, answers)):
            return self
        with suppress(RequestFailure):  # The next trial meets it too.
            now = await _time_first_token(seen, lambda p: self.ask_briefly(p, 1, {}), Answer())
            seen = replace(seen, first_token_s=min(seen.first_token_s, now.first_token_s))
        return replace(self, capabilities=seen, n_timed_again=self.n_timed_again + 1)

    async def ask_briefly(self, prompt: Prompt, max_tokens: int, fields: Body) -> Answer:
        """A short request outside any trial, with the usual retries."""
        return await _ask_briefly(self.spec, self.dialect, self.client, prompt, max_tokens, fields)


async def _ask_briefly(
    spec: RunSpec, dialect: Dialect, client: Client, prompt: Prompt, max_tokens: int, fields: Body
) -> Answer:
    max_tokens = max(max_tokens, dialect.least_tokens)
    body = dialect.body(spec.model, prompt, max_tokens, spec.decoding)
    answer = await client.ask({**body, **fields}, max_tokens)
    answer.settle(max_tokens, len(answer.token_ids) or len(answer.tokens) or answer.n_tokens)
    return answer


async def open_server(
    spec: RunSpec,
    endpoint: Endpoint,
    transport: Transport,
    extra_body: Body,
    say: Callable[[str], None],
) -> Server:
    """Find out who answers and what it can do, by short requests for the first probe.

    ``extra_body`` goes with every request.
    Raises BackendError where the server fails, UsageError where it refuses what is asked.
    """
    try:
        with doing("asking the server what it is"):
            identity = await identify(transport, spec.model)
        gauge = await find_gauge(transport)
        kinds: list[Callable[..., Dialect]] = [Chat, Responses] if spec.chat else [Completions]
        # Its own API takes no field of OpenAI's.
        is_plain = not (spec.chat or endpoint.extra_body or endpoint.stop)
        if identity.server == "SGLang" and gauge and is_plain:
            kinds = [Generate]
        refused: RequestFailure | None = None
        for kind in kinds:
            dialect = kind(sends_temperature=not endpoint.omits_temperature)
            client = Client(
                transport, dialect, endpoint.n_retries, endpoint.timeout_s, extra_body, say
            )
            try:
                with doing("trying what the server can do"):
                    capabilities = await _find_capabilities(spec, transport, dialect, client, say)
                break
            except RequestFailure as failure:
                is_elsewhere = "/responses" in str(failure)
                if failure.status not in NOT_THERE and not is_elsewhere:
                    raise
                refused = refused or failure
        else:
            raise refused or RequestFailure("nothing was asked")
        if spec.decoding.max_tokens < dialect.least_tokens:
            raise UsageError(
                f"--max-tokens {spec.decoding.max_tokens}: this server offers {dialect.path} "
                f"alone, which gives {dialect.least_tokens} or more"
            )
        if spec.decoding.temperature and "seed" not in capabilities.accepted:
            raise UsageError(
                f"--temperature {spec.decoding.temperature:g}: this server takes no "
                "seed, so its draws differ by design: give 0"
            )
        prompt = spec.probes[0].content
        n_tokens = min(N_PROBING_TOKENS, spec.decoding.max_tokens)
        if endpoint.stop:
            # Refused now rather than in the first trial.
            stopping = {**capabilities.probe_fields, "stop": list(endpoint.stop)}
            await _ask_briefly(spec, dialect, client, prompt, n_tokens, stopping)
        cache = await prefix_cache.find(
            identity.server,
            transport,
            lambda fields: _ask_briefly(
                spec, dialect, client, prompt, n_tokens, {**capabilities.probe_fields, **fields}
            ),
        )
        with doing("asking for completions of other lengths"):
            answers = await _vary_limit(spec, dialect, client, capabilities)
        capabilities = capabilities.confirmed_by(answers)
        n_others = _count_other_beginnings([a for _, a in answers], capabilities)
        metrics = MetricsWitness(transport, gauge) if gauge else None
        server = Server(spec, identity, dialect, client, capabilities, metrics, cache, n_others)
        n_rows = max(spec.batch_sizes, default=1)
        if metrics and n_rows > N_STREAMED:
            with doing("asking for a completion in one piece"):
                n_rows = N_STREAMED if await server.gives_the_same_whole() else n_rows
        return replace(server, n_streamed=n_rows)
    except RequestFailure as failure:
        if (
            failure.status is not None
            and 300 <= failure.status < 500
            and failure.status not in BUSY
        ):
            raise await _explain(failure, spec, endpoint, transport) from failure
        raise BackendError(f"--endpoint {transport.base}: {failure}") from failure


async def _find_capabilities(
    spec: RunSpec,
    transport: Transport,
    dialect: Dialect,
    client: Client,
    say: Callable[[str], None],
) -> Capabilities:
    """What works for short requests; longer ones where the first tokens of the model are hidden.

    Raises RequestFailure where the server fails, UsageError where it refuses what was asked.
    """
    prompt, n_tokens = spec.probes[0].content, min(N_PROBING_TOKENS, spec.decoding.max_tokens)
    n_tokens = max(n_tokens, dialect.least_tokens)
    while True:
        try:
            first = await _ask_briefly(spec, dialect, client, prompt, n_tokens, {})
            if not first.text and not first.token_ids and n_tokens < spec.decoding.max_tokens:
                n_tokens = spec.decoding.max_tokens
                continue
            break
        except RequestFailure as failure:
            if dialect.take_hint(str(failure)):
                say(f"asking the server otherwise, after: {failure}")
                continue
            if failure.status in INVALID and n_tokens < spec.decoding.max_tokens:
                # Reasoning may need more tokens, or --extra-body may ask for as many.
                n_tokens = dialect.least_tokens = spec.decoding.max_tokens
                continue
            raise
    if not first.text and not first.token_ids:
        empty = first.why_empty(n_tokens)
        raise UsageError(f"--endpoint {transport.base} --model {spec.model}: {empty}")
    found = await probe(
        dialect,
        lambda fields: _ask_briefly(spec, dialect, client, prompt, n_tokens, fields),
        first,
        n_tokens,
    )
    try:
        return await _time_first_token(
            found, lambda fresh: _ask_briefly(spec, dialect, client, fresh, 1, {}), first
        )
    except RequestFailure as failure:
        if failure.is_unreachable or failure.status in BUSY:
            raise
        return found


async def _vary_limit(
    spec: RunSpec, dialect: Dialect, client: Client, capabilities: Capabilities
) -> list[tuple[int, Answer]]:
    """Completions of the first probe at its limit and below, each with its limit."""
    n_tokens = max(dialect.least_tokens, min(spec.decoding.max_tokens, LONGEST_LIMIT))
    least = max(dialect.least_tokens, n_tokens - N_LIMITS + 1)
    prompt, fields = spec.probes[0].content, capabilities.probe_fields
    return [
        (n, await _ask_briefly(spec, dialect, client, prompt, n, fields))
        for n in range(n_tokens, least - 1, -1)
    ]


def _count_other_beginnings(answers: Sequence[Answer], capabilities: Capabilities) -> int:
    """How many completions that differ in their limit alone do not begin like the first.

    What repeats whole answers, or chooses a replica by the request, gives equal requests equal
    answers whatever the model does; requests for a token less are others to it.
    """
    streams = [answer.stream(capabilities.compared)[0] for answer in answers]
    # The end of a text may be part of a character.
    n_loose = 0 if capabilities.compared == "token ids" else 2
    n_shared = max(0, min(map(len, streams)) - n_loose)
    return sum(stream[:n_shared] != streams[0][:n_shared] for stream in streams)


async def _time_first_token(
    capabilities: Capabilities,
    ask_fresh: Callable[[str], Awaitable[Answer]],
    known: Answer,
) -> Capabilities:
    """With the quickest first token of prompts that no cache can hold, and the use of ids.

    ``ask_fresh`` asks for one token after a prompt; ``known`` answered another prompt.
    """
    quickest_s, ids = float("inf"), [known.response_id]
    for n in range(N_TIMINGS):
        answer = await ask_fresh(f"{uuid.uuid4().hex} {filler_text(n, 8)}")
        first_s = answer.first_s or time.perf_counter()
        quickest_s = min(quickest_s, first_s - answer.sent_s)
        ids.append(answer.response_id)
    return replace(capabilities, first_token_s=quickest_s, has_ids=_are_own(ids))


def _are_own(ids: Sequence[str]) -> bool:
    """Has each answer an id that no other has? Ollama draws one of 999, and so repeats itself."""
    if "" in ids or len(set(ids)) < len(ids):
        return False
    short = [_SHORT_NUMBER.fullmatch(name) for name in ids]
    if len({match and match[1] for match in short}) > 1 or short[0] is None:
        return True
    numbers = [int(match[2]) for match in short if match]
    return all(0 < b - a <= LARGEST_STEP for a, b in pairwise(numbers))  # It counts.
