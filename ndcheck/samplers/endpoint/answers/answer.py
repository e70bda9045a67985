"""What one request brought back, put together from the events of its stream."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from ndcheck.analysis.divergence import id_of_name
from ndcheck.samplers.endpoint.answers import beside
from ndcheck.samplers.endpoint.answers.event_stream import RequestFailure, paired, plain
from ndcheck.samplers.endpoint.answers.events import Frame, Said, Token
from ndcheck.samplers.endpoint.redaction import Redactor

Compared = Literal["token ids", "logprob tokens", "text"]
"""What stands for a completion, best first: the position unit of ``text`` is a character.
The text is compared with each of them."""
ALIGNMENT_WINDOW = 256
LEAST_REPEATED = 4
MOST_WORDS_A_TOKEN = 2
"""No vocabulary has so many on average; how much of a text an event brings says nothing."""
DISOBEYS = "the server does not obey --max-tokens"
EMPTY = (
    "the completion is empty: its {} tokens are reasoning that the server does not show: "
    "raise --max-tokens, or turn the reasoning off in the server, or where it takes such fields "
    'with --extra-body \'{{"reasoning_effort": "low"}}\' or '
    '\'{{"chat_template_kwargs": {{"enable_thinking": false}}}}\''
)
UNREAD = ": what the server sent is in fields that ndcheck does not read: "
LEAST_STEP_S = 0.0005
"""Few models take less for a token, on average; events that lie ready have one time, or few."""


@dataclass(slots=True)
class Arrival:
    """When an event came (`time.perf_counter` seconds), and how much had come by then."""

    at_s: float
    n_token_ids: int
    n_tokens: int
    n_characters: int


@dataclass(slots=True)
class Answer(Said):
    """A completion as it arrives.

    ``pieces`` are the texts that events brought. ``token_ids`` and ``tokens`` go by token and are
    empty where the server does not give them. ``is_whole``: the server said that it sent all.
    ``is_cached``: the server said that it did not compute it. ``sent_s`` is when it was asked for,
    `time.perf_counter` seconds.
    """

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)
    is_whole: bool = False
    connection: str = ""
    is_cached: bool = False
    sent_s: float = 0.0
    n_characters: int = 0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def names(self) -> list[str]:
        """The tokens' names, which need not make up the text."""
        return [token.name for token in self.tokens]

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Log-probabilities of the tokens, in nats; empty if any of them is unusable."""
        values = tuple(t.logprob for t in self.tokens if t.logprob is not None)
        n_compared = len(self.token_ids) or len(self.tokens)
        return values if len(values) == len(self.tokens) == n_compared else ()

    @property
    def margins(self) -> tuple[float, ...]:
        return tuple(token.margin for token in self.tokens) if self.logprobs else ()

    @property
    def row_digests(self) -> tuple[str, ...]:
        """Those of the tokens; empty unless each has one."""
        digests = tuple(token.digest for token in self.tokens)
        return digests if self.logprobs and all(digests) else ()

    @property
    def first_s(self) -> float | None:
        """When the first of it came; `time.perf_counter` seconds, like ``last_s``."""
        return self.arrivals[0].at_s if self.arrivals else None

    @property
    def last_s(self) -> float:
        return self.arrivals[-1].at_s if self.arrivals else -math.inf

    @property
    def came_at_once(self) -> bool:
        """Was there no time for a step between its events?

        A proxy may hold back a stream, and send all of it together.
        """
        n_steps = len(self.arrivals) - 1
        return n_steps < 1 or self.last_s - self.arrivals[0].at_s < LEAST_STEP_S * n_steps

    def add(self, frame: Frame, now_s: float) -> None:
        """Take an event in that came at ``now_s``."""
        text, token_ids, tokens = frame.text, frame.token_ids, frame.tokens
        if frame.is_cumulative:
            whole = self.text
            text = text.removeprefix(whole) if text.startswith(whole) else text
            token_ids = token_ids[len(self.token_ids) :]
            tokens = tokens[len(self.tokens) :] if len(tokens) > len(token_ids) else tokens
        if text:
            self.pieces.append(text)
            self.n_characters += len(text)
        self.token_ids += token_ids
        self.tokens += tokens
        if text or token_ids or tokens:
            self.arrivals.append(
                Arrival(now_s, len(self.token_ids), len(self.tokens), self.n_characters)
            )
        self.finish_reason = frame.finish_reason or self.finish_reason
        self.is_end |= frame.is_end
        self.has_prompt_logprobs |= frame.has_prompt_logprobs
        beside.add(self.beside, frame.beside)
        for name in ("fingerprint", "response_id", "served", "prompt_token_ids"):
            setattr(self, name, getattr(frame, name) or getattr(self, name))
        for name in ("n_prompt_tokens", "n_tokens", "n_cached_tokens", "n_reasoning_tokens"):
            if (value := getattr(frame, name)) is not None:
                setattr(self, name, value)

    @property
    def is_blank(self) -> bool:
        """Whether nothing of a completion has come, not even its end."""
        return not (self.pieces or self.token_ids or self.is_end)

    def close(self, redactor: Redactor, *, is_whole: bool, stray: str = "", said: str = "") -> None:
        """All has arrived: secrets that several events held in parts are cut out.

        ``stray`` are words beside the events, ``said`` those of an event without a completion.
        Raises RequestFailure unless the completion, or the server, said that it ended.
        """
        self.is_whole = is_whole
        self.pieces = redactor.redact_pieces(self.pieces)
        names = redactor.redact_pieces(self.names)
        if names != self.names:
            self.tokens = [
                replace(token, name=name) for name, token in zip(names, self.tokens, strict=True)
            ]
        if _repeats_all(self.pieces):
            raise RequestFailure(
                "each event of the stream holds all of the text so far, where OpenAI's API sends "
                "what is new: switch that to increments in the server or its gateway"
            )
        if not (self.is_end or is_whole):
            raise RequestFailure(f"the stream ended before the completion did{stray}")
        if self.is_blank:
            fields = beside.fields_of(self.beside)
            raise RequestFailure(
                f"the answer holds no completion{fields and UNREAD + fields}{said}"
            )

    def n_sent(self, compared: Compared) -> int | None:
        """Tokens that arrived, None where these cannot be told."""
        if compared == "text":
            return None
        return len(self.token_ids) if compared == "token ids" else len(self.tokens)

    def settle(self, max_tokens: int, n_tokens: int | None) -> None:
        """Say how the completion ended where its server did not; ``n_tokens`` as far as known."""
        if self.finish_reason is None:
            is_full = n_tokens is not None and n_tokens >= max_tokens
            self.finish_reason = "length" if is_full else "stop"

    def check(self, max_tokens: int, compared: Compared, *, counts_tokens: bool) -> None:
        """Raise RequestFailure where the answer contradicts itself or is not what was asked.

        ``counts_tokens``: the server's usage is a count and no estimate.
        """
        n_sent = self.n_sent(compared)
        n_counted = self.n_tokens if counts_tokens else None
        if n_sent and n_counted == n_sent + (self.n_reasoning_tokens or 0):
            n_sent = n_counted  # What is not shown was generated all the same.
        n = n_counted if n_sent is None else n_sent
        self.settle(max_tokens, n)
        if n_sent == 0 and self.text:
            raise RequestFailure(f"the answer holds no {compared}, which it did when probed")
        is_cut = self.finish_reason == "length" or self.n_reasoning_tokens
        if is_cut and not self.text and not self.token_ids:
            raise RequestFailure(self.why_empty(max_tokens))
        # The token that ends a completion may be counted without being sent.
        n_unsent = 0 if n_counted is None or n_sent is None else n_counted - n_sent
        if n_unsent not in ((0, 1) if self.finish_reason == "stop" else (0,)):
            raise RequestFailure(
                f"wrong token count: usage says {n_counted}, the stream holds {n_sent}"
            )
        if self.token_ids and self.tokens and len(self.token_ids) != len(self.tokens):
            raise RequestFailure(
                f"wrong token count: {len(self.token_ids)} token ids, {len(self.tokens)} logprobs"
            )
        if n is None:
            n_words = len(self.text.split())
            if n_words > MOST_WORDS_A_TOKEN * max_tokens:
                raise RequestFailure(
                    f"wrong token count: {n_words} words of {max_tokens} tokens: {DISOBEYS}"
                )
            return
        is_short = self.finish_reason == "length" and n < max_tokens
        if n > max_tokens or is_short:
            cure = (
                f"the server has a limit of its own: give --max-tokens {n} or less"
                if is_short
                else DISOBEYS
            )
            raise RequestFailure(
                f"wrong token count: {n} of {max_tokens} tokens, "
                f"finish_reason {self.finish_reason!r}: {cure}"
            )

    def stream(self, compared: Compared) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The completion as ids and texts of equal number; equal ids mean equal completions.

        Only a server's own ids can be equal where the texts are not.
        """
        text = paired(self.text)
        if compared == "text":
            return tuple(map(ord, text)), tuple(map(plain, text))
        if compared == "token ids":
            texts = _spread(text, self.names, len(self.token_ids))
            return tuple(self.token_ids), tuple(map(plain, texts))
        texts = align(text, self.names)
        ids = tuple(map(id_of_name, self.names, texts))
        return ids, tuple(map(plain, texts))

    def unit_times_s(self, compared: Compared, n_units: int) -> list[float]:
        """When each of the units that are compared arrived.

        Some give ids and log-probabilities with the last event: then as the text did.
        """
        counted = {
            "token ids": [a.n_token_ids for a in self.arrivals],
            "logprob tokens": [a.n_tokens for a in self.arrivals],
            "text": [a.n_characters for a in self.arrivals],
        }[compared]
        if len(counted) > 1 and not any(counted[:-1]) and self.n_characters:
            counted = [n_units * a.n_characters // self.n_characters for a in self.arrivals]
        times: list[float] = []
        for arrival, n in zip(self.arrivals, counted, strict=True):
            times += [arrival.at_s] * (min(n, n_units) - len(times))
        return times + [self.last_s] * (n_units - len(times))

    def why_empty(self, n_tokens: int) -> str:
        """Why there is no completion to be seen, of ``n_tokens`` unless the server counts them."""
        if fields := beside.fields_of(self.beside):
            return f"the completion is empty{UNREAD}{fields}"
        return EMPTY.format(self.n_reasoning_tokens or self.n_tokens or n_tokens)

    @property
    def beside_digest(self) -> str:
        """What is not compared, by field, in one line; hidden tokens are counted."""
        hidden = {"reasoning_tokens": str(self.n_reasoning_tokens)}
        return beside.digest(self.beside | (hidden if self.n_reasoning_tokens else {}))

    @property
    def names_digest(self) -> str:
        """16 hexadecimal digits over the tokens' names; empty without any."""
        if not self.tokens:
            return ""
        names = "\0".join(self.names).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(names, digest_size=8).hexdigest()


def _repeats_all(pieces: list[str]) -> bool:
    """Does each of several pieces begin with the one before it, as no tokens of a text do?

    The last event may bring nothing new, and all of it once more.
    """
    pieces = pieces[:-1] if pieces[-1:] == pieces[-2:-1] else pieces
    grows = all(b.startswith(a) and len(b) > len(a) for a, b in pairwise(pieces))
    return grows and len(pieces) >= LEAST_REPEATED and any(map(str.isalpha, pieces[0]))


def align(text: str, names: list[str]) -> tuple[str, ...]:
    """The part of ``text`` that belongs to each name; the parts make up the text.

    Names that do not stand in the text (a byte of a character, a marker for a space) share what
    lies before the next that does: it goes to the last of them. A function of text and names
    alone, since events may bring equal completions in other portions.
    """
    parts = [""] * len(names)
    at, is_waiting = 0, False
    for i, name in enumerate(names):
        if is_waiting:
            found = text.find(name, at, at + ALIGNMENT_WINDOW) if name.strip("\ufffd") else -1
            if found >= 0:
                parts[i - 1] = text[at:found]
                at, is_waiting = found, False
        if not is_waiting and text.startswith(name, at):
            parts[i] = name
            at += len(name)
        else:
            is_waiting = True
    if names:
        parts[-1] += text[at:]
    return tuple(parts)


def _spread(text: str, names: list[str], n_tokens: int) -> tuple[str, ...]:
    """The text by token, if the names allow it; else all of it with the first."""
    if len(names) == n_tokens:
        return align(text, names)
    return (text, *[""] * (n_tokens - 1)) if n_tokens else ()
