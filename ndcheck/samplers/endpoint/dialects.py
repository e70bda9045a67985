"""How each kind of API is asked for a completion, and how its events are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from ndcheck.records import Decoding
from ndcheck.samplers.endpoint.answer import Answer, RequestFailure

Body = dict[str, Any]
Event = dict[str, Any]
_WRONG_SHAPE = (KeyError, IndexError, TypeError, AttributeError, ValueError)


class Dialect(Protocol):
    """One way to ask a server for a completion."""

    path: str

    @property
    def optional(self) -> Mapping[str, Body]:
        """Fields that not every server takes, by what they are for; they are probed one by one."""

    def body(self, model: str, prompt: str, max_tokens: int, decoding: Decoding) -> Body:
        """The request, without optional fields."""

    def take_hint(self, message: str) -> bool:
        """Change the request as a refusal says; True if that is worth another try."""

    def read(self, event: Event, answer: Answer) -> bool:
        """Add an event to the answer; True if it brought part of the completion.

        Raises RequestFailure for an event of another shape.
        """


class Completions:
    """``/completions``: the prompt as it is.

    Streamed only where the stream is needed as the witness: an event for each token costs the
    server's front end and this client more than the rest of the request.
    """

    path = "/completions"
    _logprobs: ClassVar[Body] = {"logprobs": 2}

    def __init__(self, *, streamed: bool) -> None:
        self._streamed = streamed
        self._limit = "max_tokens"

    @property
    def optional(self) -> Mapping[str, Body]:
        usage = {"usage": {"stream_options": {"include_usage": True}}} if self._streamed else {}
        return {
            "token ids": {"return_token_ids": True},
            "logprobs": self._logprobs,
            **usage,
            "seed": {"seed": 0},
            "ignore_eos": {"ignore_eos": True},
            "min_tokens": {"min_tokens": 1},
            "prompt logprobs": {"prompt_logprobs": 1},
        }

    def body(self, model: str, prompt: str, max_tokens: int, decoding: Decoding) -> Body:
        return {
            "model": model,
            **self._content(prompt),
            self._limit: max_tokens,
            "temperature": decoding.temperature,
            "stream": self._streamed,
        }

    def take_hint(self, message: str) -> bool:
        newer = "max_completion_tokens"
        if newer not in message or self._limit == newer:
            return False
        self._limit = newer
        return True

    def _content(self, prompt: str) -> Body:
        return {"prompt": prompt}

    def read(self, event: Event, answer: Answer) -> bool:
        try:
            _read_frame(event, answer)
            return any(_read_choice(choice, answer) for choice in event.get("choices") or ())
        except _WRONG_SHAPE as error:
            raise _wrong_shape(error) from error


class Chat(Completions):
    """``/chat/completions``: the prompt as the user's message, in the server's chat template."""

    path = "/chat/completions"
    _logprobs: ClassVar[Body] = {"logprobs": True, "top_logprobs": 2}

    def _content(self, prompt: str) -> Body:
        return {"messages": [{"role": "user", "content": prompt}]}


class Generate:
    """SGLang's own ``/generate``, which gives token ids; its metrics are the witness."""

    path = "/generate"
    optional: Mapping[str, Body] = {
        "logprobs": {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": -1},
    }

    def body(self, model: str, prompt: str, max_tokens: int, decoding: Decoding) -> Body:
        parameters = {"max_new_tokens": max_tokens, "temperature": decoding.temperature}
        return {"text": prompt, "sampling_params": parameters, "stream": False}

    def take_hint(self, message: str) -> bool:
        return False

    def read(self, event: Event, answer: Answer) -> bool:
        try:
            return self._read(event, answer)
        except _WRONG_SHAPE as error:
            raise _wrong_shape(error) from error

    def _read(self, event: Event, answer: Answer) -> bool:
        meta = event["meta_info"]
        answer.pieces.append(str(event["text"]))
        answer.token_ids += _token_ids(event["output_ids"])
        tops = meta.get("output_top_logprobs") or ()
        for i, (logprob, _, text) in enumerate(meta.get("output_token_logprobs") or ()):
            top = tops[i] if i < len(tops) else None
            answer.add_logprob(text or "", logprob, [entry[0] for entry in top or ()])
        answer.n_prompt_tokens = _count(meta.get("prompt_tokens"))
        answer.n_tokens = _count(meta.get("completion_tokens"))
        answer.n_cached_tokens = _count(meta.get("cached_tokens"))
        reason = meta.get("finish_reason")
        if reason is not None:
            answer.finish(reason["type"])
        return True


def _read_frame(event: Event, answer: Answer) -> None:
    """What an event says beside its choices."""
    fingerprint = event.get("system_fingerprint")
    if fingerprint:
        answer.fingerprint = str(fingerprint)[:200]
    usage = event.get("usage")
    if usage:
        answer.n_prompt_tokens = _count(usage.get("prompt_tokens"))
        answer.n_tokens = _count(usage.get("completion_tokens"))
        details = usage.get("prompt_tokens_details") or {}
        answer.n_cached_tokens = _count(details.get("cached_tokens"))
    timings = event.get("timings")
    if timings:  # llama.cpp
        answer.n_cached_tokens = _count(timings.get("cache_n"))


def _read_choice(choice: Event, answer: Answer) -> bool:
    part = choice.get("delta") or choice.get("message") or choice
    # Models that reason spend tokens on it first: they are part of what is compared.
    pieces = (part.get("reasoning_content") or part.get("reasoning"), part.get("content"))
    text = "".join(str(piece) for piece in (*pieces, part.get("text")) if piece)
    if text:
        answer.pieces.append(text)
    n_before = len(answer.token_ids), len(answer.tokens)
    answer.token_ids += _token_ids(choice.get("token_ids") or ())
    logprobs = choice.get("logprobs")
    if logprobs:
        if logprobs.get("content") is not None:
            _read_chat_logprobs(logprobs["content"], answer)
        else:
            _read_completion_logprobs(logprobs, answer)
    answer.has_prompt_logprobs |= bool(choice.get("prompt_logprobs"))
    if choice.get("finish_reason") is not None:
        answer.finish(choice["finish_reason"])
    return bool(text) or n_before != (len(answer.token_ids), len(answer.tokens))


def _read_chat_logprobs(entries: list[Any], answer: Answer) -> None:
    has_ids = not answer.token_ids or len(answer.token_ids) == len(answer.tokens)
    for entry in entries:
        top = entry.get("top_logprobs") or ()
        answer.add_logprob(str(entry["token"]), entry["logprob"], [t["logprob"] for t in top])
        if has_ids and "id" in entry:  # llama.cpp
            answer.token_ids += _token_ids([entry["id"]])


def _read_completion_logprobs(logprobs: Event, answer: Answer) -> None:
    tops = logprobs.get("top_logprobs") or ()
    values = logprobs["token_logprobs"]
    for i, (token, value) in enumerate(zip(logprobs["tokens"], values, strict=True)):
        top = tops[i] if i < len(tops) and tops[i] else {}
        answer.add_logprob(str(token), value, list(top.values()))


def _token_ids(values: Any) -> list[int]:
    for value in values:
        if type(value) is not int or not 0 <= value < 2**31:
            raise RequestFailure(f"{str(value)[:40]!r} is no token id")
    return list(values)


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _wrong_shape(error: Exception) -> RequestFailure:
    detail = f"no field {error}" if isinstance(error, KeyError) else str(error)
    return RequestFailure(f"an event of another shape: {detail}")
