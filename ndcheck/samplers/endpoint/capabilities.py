"""What a server can do: tried out, never assumed."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from ndcheck.errors import UsageError
from ndcheck.samplers.endpoint.answers.answer import Answer, Compared
from ndcheck.samplers.endpoint.answers.dialects import Body, Dialect
from ndcheck.samplers.endpoint.answers.event_stream import RequestFailure

FP32_DIGITS = 6
"""Fewer significant digits cannot tell neighbouring fp32 values apart."""
SENT_WITH_PROBES = ("token ids", "logprobs", "usage", "seed")
VISIBLE = ("token ids", "logprobs", "usage", "prompt logprobs")
"""Servers ignore fields that they do not know: these have to show in the answer."""
BUSY = frozenset({408, 429, 503, 529})
"""A field is not refused by a server that has no time; some break (500) at one they do not know."""
BEST_FIRST = get_args(Compared)
Ask = Callable[[Body], Awaitable[Answer]]
"""Send a short request for the probe with these optional fields; raises RequestFailure."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The optional fields that work, and what completions are compared by.

    ``counts_tokens`` False: the server's usage is an estimate. ``first_token_s``: no first token
    can come sooner. ``has_ids``: every answer has a response id of its own. ``says_end``: every
    answer says how its completion ended.
    """

    compared: Compared
    accepted: dict[str, Body] = field(default_factory=dict)
    logprob_digits: int | None = None
    fingerprint: str = ""
    served: str = ""
    counts_tokens: bool = True
    first_token_s: float = 0.0
    has_ids: bool = False
    says_end: bool = False

    @property
    def probe_fields(self) -> Body:
        """What every probe is sent with."""
        return {k: v for name in SENT_WITH_PROBES for k, v in self.accepted.get(name, {}).items()}

    @property
    def seen(self) -> str:
        """In one line: what works, and what is taken without showing whether it does."""
        working = [name for name in self.accepted if name in VISIBLE]
        taken = [name for name in self.accepted if name not in VISIBLE]
        estimate = "" if self.counts_tokens else "; usage is an estimate"
        return (
            f"works: {', '.join(working) or 'none'}; accepted: {', '.join(taken) or 'none'}"
            f"{estimate}"
        )

    def came_too_soon(self, answer: Answer) -> bool:
        """Was it all there well before a first token can be, which was timed a few times only?"""
        took_s = answer.last_s - answer.sent_s if answer.arrivals else math.inf
        return took_s < self.first_token_s / 3

    def filler_fields(self, n_tokens: int) -> Body:
        """Fillers should fill the batch to the end."""
        least = {"min_tokens": n_tokens} if "min_tokens" in self.accepted else {}
        return {**self.accepted.get("ignore_eos", {}), **least}

    def confirmed_by(self, answers: Sequence[tuple[int, Answer]]) -> Capabilities:
        """What still holds of longer answers, each with its limit.

        An estimate may be right for a few tokens, and some give log-probabilities of the first
        tokens alone. A server with a limit of its own counts as many whatever is asked for.
        """
        seen = {self.compared} | {_find_compared(a, n) for n, a in answers if a.text or a.token_ids}
        compared = max(seen, key=BEST_FIRST.index)
        grows = len({len(a.text) for _, a in answers}) > 1
        counts = self.counts_tokens and not (
            grows and any(not _counts_tokens(a, n) for n, a in answers)
        )
        says_end = all(a.is_end for _, a in answers)
        return replace(self, compared=compared, counts_tokens=counts, says_end=says_end)


async def probe(dialect: Dialect, ask: Ask, plain: Answer, n_tokens: int) -> Capabilities:
    """Try every optional field alone, keep those that work, and then try those kept together.

    ``plain`` answered without any; ``n_tokens`` is what ``ask`` asks for. Raises UsageError where
    kept fields clash, RequestFailure where the server is gone or has no time.
    """
    answers = [plain]
    accepted: dict[str, Body] = {}
    for name, fields in dialect.optional.items():
        try:
            answer = await ask(fields)
        except RequestFailure as failure:
            if failure.is_unreachable or failure.status in BUSY:
                raise
            continue
        if _shows(name, answer):
            accepted[name] = fields
            answers.append(answer)
    kept = Capabilities("text", accepted)
    try:
        answer = await ask(kept.probe_fields)
    except RequestFailure as failure:
        if failure.is_unreachable or failure.status in BUSY:
            raise
        raise UsageError(
            f"the server takes {', '.join(accepted)} one by one but not together: {failure}"
        ) from failure
    answers.append(answer)
    return Capabilities(
        _find_compared(answer, n_tokens),
        accepted,
        max(map(_significant_digits, answer.logprobs), default=None),
        next((a.fingerprint for a in reversed(answers) if a.fingerprint), ""),
        next((a.served for a in reversed(answers) if a.served), ""),
        counts_tokens=all(_counts_tokens(a, n_tokens) for a in answers),
    )


def _find_compared(answer: Answer, n_tokens: int) -> Compared:

    def is_full(found: list[Any]) -> bool:
        """Some give log-probabilities, and ids with them, for the most interesting tokens only."""
        n_made = len(found) + (answer.n_reasoning_tokens or 0)
        is_whole = answer.finish_reason != "length" or n_tokens in (len(found), n_made)
        return bool(found) and is_whole

    if is_full(answer.token_ids):
        return "token ids"
    return "logprob tokens" if is_full(answer.tokens) and not answer.token_ids else "text"


def _counts_tokens(answer: Answer, n_tokens: int) -> bool:
    """Does the usage agree with what arrived, or at the limit with what was asked for?"""
    n_sent = len(answer.token_ids) or len(answer.tokens)
    if answer.n_tokens is None:
        return True
    if n_sent and answer.n_tokens == n_sent + (answer.n_reasoning_tokens or 0):
        return True
    if n_sent and answer.finish_reason != "length":
        return answer.n_tokens - n_sent in (0, 1)
    return answer.n_tokens == (n_sent or n_tokens) if answer.finish_reason == "length" else True


def _shows(name: str, answer: Answer) -> bool:
    return {
        "token ids": bool(answer.token_ids),
        "logprobs": bool(answer.logprobs),
        "usage": answer.n_tokens is not None,
        "prompt logprobs": answer.has_prompt_logprobs,
    }.get(name, True)


def _significant_digits(value: float) -> int:
    mantissa = repr(value).lstrip("-").partition("e")[0].replace(".", "")
    return len(mantissa.strip("0"))
