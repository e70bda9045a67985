"""What an event of an answer says, in known types: the one place where a server is believed."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass, field
from typing import Any

from ndcheck.records import FinishReason
from ndcheck.samplers.endpoint.answers import beside
from ndcheck.samplers.endpoint.answers.beside import PARTS, REASONING, Beside
from ndcheck.samplers.endpoint.answers.event_stream import Event, RequestFailure, find_words, plain

MAX_FACT = 200
MAX_COUNT = 2**31
LOWEST = -3.4e38
"""llama.cpp writes fp32's lowest number for a probability of zero."""
_LIMITS = ("len", "max", "limit")
_BROKEN = (
    *("filter", "safety", "error", "abort", "cancel", "fail", "timeout", "block", "recitation"),
    *("overload", "refus", "denied", "insufficient", "disconnect", "prohibited"),
)


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token's name and, where usable, its log-probability and margin in nats.

    ``digest``: 16 hexadecimal digits over the log-probabilities of all tokens that are shown at its
    place, as fp32; empty where none is.
    """

    name: str
    logprob: float | None
    margin: float
    digest: str = ""


@dataclass(slots=True)
class Said:
    """What an event, and all events of an answer together, say of a completion beside its tokens.

    ``finish_reason`` is None where the completion goes on, or ended (``is_end``) without saying
    how. Counts are None where the server gives none that can be one.
    """

    finish_reason: FinishReason | None = None
    is_end: bool = False
    n_prompt_tokens: int | None = None
    n_tokens: int | None = None
    n_cached_tokens: int | None = None
    n_reasoning_tokens: int | None = None
    has_prompt_logprobs: bool = False
    prompt_token_ids: list[int] = field(default_factory=list)
    fingerprint: str = ""
    response_id: str = ""
    served: str = ""
    """The model that the answer names, and whose, where a gateway says that too."""
    beside: Beside = field(default_factory=dict)


@dataclass(slots=True)
class Frame(Said):
    """One event. ``token_ids`` and ``text`` are new unless ``is_cumulative``."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    is_cumulative: bool = False


def read_openai(event: Event) -> Frame:
    """An event of ``/completions`` or ``/chat/completions``, or a whole answer.

    Raises RequestFailure for what cannot be a completion.
    """
    frame = Frame(
        fingerprint=as_fact(event.get("system_fingerprint")),
        response_id=as_fact(event.get("id")),
        served=read_served(event),
    )
    # vLLM has them beside a chat's choices, and in the choice of a completion.
    frame.prompt_token_ids = as_token_ids(event.get("prompt_token_ids"))
    _read_usage(as_dict(event.get("usage")), frame)
    cached = as_count(as_dict(event.get("timings")).get("cache_n"))  # llama.cpp
    frame.n_cached_tokens = frame.n_cached_tokens if cached is None else cached
    choices = event.get("choices")
    if choices is not None and not isinstance(choices, list):
        raise RequestFailure(f"an event of another shape: choices is a {type(choices).__name__}")
    is_read = False
    for choice in map(as_dict, choices or ()):
        if choice.get("index") in (None, 0, "0") and not is_read:
            _read_choice(choice, frame)
            is_read = True
        elif choice:  # Nobody asked for more than one, unless by --extra-body.
            other = Frame()
            _read_choice(choice, other)
            texts = {f"choice.{k}": v for k, v in {"text": other.text, **other.beside}.items() if v}
            beside.add(frame.beside, texts)
    return frame


def read_served(event: Event) -> str:
    """Which model answered; OpenRouter says whose machine it was."""
    return " of ".join(filter(None, (as_fact(event.get(n)) for n in ("model", "provider"))))


def _read_usage(usage: Event, frame: Frame) -> None:
    frame.n_prompt_tokens = as_count(usage.get("prompt_tokens")) or None
    frame.n_tokens = as_count(usage.get("completion_tokens")) or None
    details = as_dict(usage.get("prompt_tokens_details"))
    frame.n_cached_tokens = as_count(details.get("cached_tokens"))
    details = as_dict(usage.get("completion_tokens_details"))
    frame.n_reasoning_tokens = as_count(details.get("reasoning_tokens"))


def _read_choice(choice: Event, frame: Frame) -> None:
    if choice.get("error"):
        raise RequestFailure(f"the server says: {find_words(choice['error'])[:MAX_FACT]}")
    # Beside what is new, even if that is nothing, a message is all of it once more.
    part = choice.get("message") if choice.get("delta") is None else choice["delta"]
    part = as_dict(part) or choice
    # Models that reason spend tokens on it first: they are part of what is compared.
    reasoning = next((part[name] for name in REASONING if part.get(name)), None)
    held = (reasoning, part.get("content"), part.get("text"), part.get("refusal"))
    frame.text = "".join(map(as_text, held)) + "".join(_read_calls(part))
    frame.beside = beside.ends_of(choice) | (beside.unread(part) if part is not choice else {})
    if reasoning:  # Where it ends is no part of the text that it and the answer make up.
        frame.beside["reasoning"] = as_text(reasoning)
    frame.token_ids = as_token_ids(choice.get("token_ids"))
    frame.prompt_token_ids = frame.prompt_token_ids or as_token_ids(choice.get("prompt_token_ids"))
    logprobs = as_dict(choice.get("logprobs"))
    if isinstance(logprobs.get("content"), list):
        read_entries(logprobs["content"], frame)
    elif isinstance(logprobs.get("tokens"), list):
        _read_completion_logprobs(logprobs, frame)
    frame.has_prompt_logprobs = bool(choice.get("prompt_logprobs"))
    read_end(choice.get("finish_reason"), frame)


def _read_calls(part: Event) -> list[str]:
    """Calls of tools by name and arguments; their ids are made up anew for each answer."""
    calls = [as_dict(call) for call in as_list(part.get("tool_calls"))]
    functions = [call.get("function") or call.get("custom") for call in calls]
    return [read_call(as_dict(function)) for function in (*functions, part.get("function_call"))]


def read_call(function: Event) -> str:
    """A call's name and arguments, which some servers give as an object or a list."""
    given = function.get("arguments") or function.get("input")
    is_value = isinstance(given, dict | list)
    words = json.dumps(given, ensure_ascii=False) if is_value else as_text(given)
    return as_text(function.get("name")) + words


def read_entries(entries: list[Any], frame: Frame) -> None:
    """Tokens as chat completions and responses list them, with their log-probabilities."""
    ids = []
    for entry in map(as_dict, entries):
        top = [as_dict(t).get("logprob") for t in as_list(entry.get("top_logprobs"))]
        logprob = entry.get("logprob")
        if logprob == 0 and entry.get("top_logprobs") == []:
            logprob = None  # llama.cpp knows none of a token that a draft model proposed.
        frame.tokens.append(make_token(_name(entry), logprob, top))
        if "id" in entry:  # llama.cpp
            ids.append(entry["id"])
    if not frame.token_ids and len(ids) == len(entries):
        frame.token_ids = as_token_ids(ids)


def _name(entry: Event) -> str:
    """The token's name, or its bytes where the name has a replacement for some of them."""
    name, content = as_text(entry.get("token")), as_list(entry.get("bytes"))
    if "\ufffd" in name and content and all(type(b) is int and 0 <= b < 256 for b in content):
        return bytes(content).decode("utf-8", "surrogateescape")
    return name


def _read_completion_logprobs(logprobs: Event, frame: Frame) -> None:
    names = as_list(logprobs["tokens"])
    values = as_list(logprobs.get("token_logprobs"))
    tops = as_list(logprobs.get("top_logprobs"))
    for i, name in enumerate(names):
        top = list(as_dict(tops[i]).values()) if i < len(tops) else []
        frame.tokens.append(make_token(name, values[i] if i < len(values) else None, top))


def read_generate(event: Event) -> Frame:
    """An event of SGLang's ``/generate``: text and ids are those of the answer so far."""
    meta = as_dict(event.get("meta_info"))
    frame = Frame(
        text=as_text(event.get("text")),
        token_ids=as_token_ids(event.get("output_ids")),
        n_prompt_tokens=as_count(meta.get("prompt_tokens")) or None,
        n_tokens=as_count(meta.get("completion_tokens")) or None,
        n_cached_tokens=as_count(meta.get("cached_tokens")),
        response_id=as_fact(meta.get("id")),
        beside=beside.ends_of(meta),
    )
    # Some versions stream only what is new.
    frame.is_cumulative = frame.n_tokens in (None, len(frame.token_ids))
    tops = as_list(meta.get("output_top_logprobs"))
    for i, entry in enumerate(as_list(meta.get("output_token_logprobs"))):
        entry = [*as_list(entry), None, None, None]
        top = [(as_list(t) or [None])[0] for t in as_list(tops[i])] if i < len(tops) else []
        frame.tokens.append(make_token(entry[2], entry[0], top))
    read_end(meta.get("finish_reason"), frame)
    return frame


def read_end(reason: Any, frame: Frame) -> None:
    """Servers call a natural end stop, eos, end_turn and much else.

    Raises RequestFailure where the word says that the completion was broken off.
    """
    details = as_dict(reason)
    word = details.get("type") if details else reason
    if not word:
        return
    frame.is_end = True
    if not isinstance(word, str):
        return
    word = word.lower()
    if any(part in word for part in _BROKEN):
        words = find_words(details)
        raise RequestFailure(
            f"the completion ended with finish_reason {word[:40]!r}"
            f"{f': {words[:MAX_FACT]}' if words else ''}"
        )
    if word not in ("null", "none", "unspecified", "unknown"):
        frame.finish_reason = "length" if any(part in word for part in _LIMITS) else "stop"


def make_token(name: Any, logprob: Any, alternatives: list[Any]) -> Token:
    """Alternatives of no probability (null, minus infinity, the lowest float) are none."""
    best = sorted((x for x in map(_finite, alternatives) if x is not None), reverse=True)
    margin = best[0] - best[1] if len(best) > 1 else math.inf
    bits = struct.pack(f">{len(best)}f", *best)
    digest = hashlib.blake2b(bits, digest_size=8).hexdigest() if best else ""
    return Token(as_text(name), _finite(logprob), margin, digest)


def _finite(value: Any) -> float | None:
    """A number that fp32 holds, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and LOWEST < value < -LOWEST else None


def as_dict(value: Any) -> Event:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str:
    """A text, or the texts of its parts. Raises RequestFailure for what is none."""
    if value is None or value is False:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(as_text, value))
    if isinstance(value, dict):
        return as_text(next((value[name] for name in PARTS if value.get(name)), None))
    raise RequestFailure(f"an event of another shape: {str(value)[:40]} is no text")


def as_fact(value: Any) -> str:
    """What a server says of itself, in a line of bounded length; unequal values stay unequal."""
    if value is None or isinstance(value, (bool, list, dict)):
        return ""
    text = " ".join(plain(str(value)).split())
    if len(text) <= MAX_FACT:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return f"{text[: MAX_FACT - 12]}... {digest}"


def as_count(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value < MAX_COUNT else None


def as_token_ids(value: Any) -> list[int]:
    """Raises RequestFailure where one of them is no token's."""
    for token_id in as_list(value):
        if type(token_id) is not int or not 0 <= token_id < MAX_COUNT:
            raise RequestFailure(f"{str(token_id)[:40]!r} is no token id")
    return as_list(value)
