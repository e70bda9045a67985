"""What one request brought back, put together from the events of its stream."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ndcheck.errors import NdcheckError
from ndcheck.records import FinishReason

Compared = Literal["token ids", "logprob tokens", "text"]
"""What stands for a completion, best first: the position unit of ``text`` is a character."""
MAX_LOGPROB = 3.4e38


class RequestFailure(NdcheckError):
    """One request failed.

    ``is_temporary``: the same request may succeed later. ``is_unreachable``: nothing accepts
    connections. ``retry_after_s`` is what the server asked for.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        is_temporary: bool = False,
        is_unreachable: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.is_temporary = is_temporary
        self.is_unreachable = is_unreachable
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Answer:
    """A completion as it arrives; times are `time.perf_counter` seconds.

    ``pieces`` are the texts that events brought. ``token_ids``, ``tokens`` (their texts),
    ``logprobs`` and ``margins`` go by token and are empty where the server does not give them.
    """

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    n_prompt_tokens: int | None = None
    n_tokens: int | None = None
    n_cached_tokens: int | None = None
    has_prompt_logprobs: bool = False
    fingerprint: str | None = None
    first_s: float | None = None
    last_s: float = 0.0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def mark(self, now_s: float) -> None:
        """Something of the completion has arrived."""
        if self.first_s is None:
            self.first_s = now_s
        self.last_s = now_s

    def add_logprob(self, token: str, logprob: Any, alternatives: list[Any]) -> None:
        """One token's log-probability in nats, and those of the most probable tokens there."""
        self.tokens.append(token)
        self.logprobs.append(checked_logprob(logprob))
        best = sorted((checked_logprob(x) for x in alternatives), reverse=True)
        self.margins.append(best[0] - best[1] if len(best) > 1 else math.inf)

    def finish(self, reason: Any) -> None:
        """The completion ended: by itself or at its limit, else RequestFailure is raised."""
        if reason not in ("stop", "length"):
            raise RequestFailure(f"the completion ended with finish_reason {str(reason)[:40]!r}")
        self.finish_reason = reason

    def check(self, max_tokens: int, compared: Compared) -> None:
        """Raise RequestFailure where the stream contradicts itself or is not whole."""
        if self.finish_reason is None:
            raise RequestFailure("the stream ended before the completion did")
        counts: list[int] | list[str] | None = None
        if compared != "text":
            counts = self.token_ids if compared == "token ids" else self.tokens
        n_sent = self.n_tokens if counts is None else len(counts)
        if counts is not None and not counts and self.text:
            raise RequestFailure(f"the answer holds no {compared}, which it did when probed")
        # The token that ends a completion may be counted without being sent.
        n_unsent = 0 if self.n_tokens is None or n_sent is None else self.n_tokens - n_sent
        if n_unsent not in ((0, 1) if self.finish_reason == "stop" else (0,)):
            raise RequestFailure(
                f"wrong token count: usage says {self.n_tokens}, the stream holds {n_sent}"
            )
        if self.token_ids and self.logprobs and len(self.token_ids) != len(self.logprobs):
            raise RequestFailure(
                f"wrong token count: {len(self.token_ids)} token ids, {len(self.logprobs)} logprobs"
            )
        if n_sent is None:
            return
        if n_sent > max_tokens or (self.finish_reason == "length" and n_sent < max_tokens):
            raise RequestFailure(
                f"wrong token count: {n_sent} of {max_tokens} tokens, "
                f"finish_reason {self.finish_reason!r}"
            )

    def stream(self, compared: Compared) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The completion as ids and texts of equal number; equal ids mean equal completions."""
        if compared == "token ids":
            return tuple(self.token_ids), _spread(self.text, self.tokens, len(self.token_ids))
        if compared == "logprob tokens":
            return tuple(map(_stable_id, self.tokens)), tuple(self.tokens)
        text = self.text
        return tuple(map(ord, text)), tuple(text)


def checked_logprob(value: Any) -> float:
    """A number that fp32 holds. Raises RequestFailure for anything else."""
    if isinstance(value, (int, float)) and -MAX_LOGPROB < value < MAX_LOGPROB:
        return float(value)
    raise RequestFailure(f"a log-probability of {str(value)[:40]!r} is not a finite number")


def _spread(text: str, tokens: list[str], n_tokens: int) -> tuple[str, ...]:
    """The text by token, if the tokens' own texts make it up; else all of it with the first."""
    if len(tokens) == n_tokens and "".join(tokens) == text:
        return tuple(tokens)
    return (text, *[""] * (n_tokens - 1)) if n_tokens else ()


def _stable_id(token: str) -> int:
    """31 bits that stand for a token's text in every process."""
    digest = hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
