"""What a server can do: tried out, never assumed."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ndcheck.errors import UsageError
from ndcheck.samplers.endpoint.answer import Answer, Compared, RequestFailure
from ndcheck.samplers.endpoint.dialects import Body, Dialect
from ndcheck.samplers.endpoint.transport import Transport

FP32_DIGITS = 6
"""Fewer significant digits cannot tell neighbouring fp32 values apart."""
UNKNOWN_CONTEXT = 1 << 20
SENT_WITH_PROBES = ("token ids", "logprobs", "usage", "seed")
VISIBLE = ("token ids", "logprobs", "usage", "prompt logprobs")
"""Servers ignore fields that they do not know: these have to show in the answer."""
Ask = Callable[[Body], Awaitable[Answer]]
"""Send a short request for the probe with these optional fields; raises RequestFailure."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who answers: what of it changes in mid-run makes two completions incomparable."""

    server: str
    version: str | None = None
    model: str | None = None
    context: int | None = None

    def digest(self, *more: object) -> str:
        """16 hexadecimal digits over these facts."""
        facts = "/".join(map(str, (self.server, self.version, self.model, *more)))
        return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The optional fields that work, and what completions are compared by."""

    compared: Compared
    accepted: dict[str, Body] = field(default_factory=dict)
    logprob_digits: int | None = None
    fingerprint: str | None = None

    @property
    def probe_fields(self) -> Body:
        """What every probe is sent with."""
        return {k: v for name in SENT_WITH_PROBES for k, v in self.accepted.get(name, {}).items()}

    @property
    def seen(self) -> str:
        """In one line: what works, and what is taken without showing whether it does."""
        working = [name for name in self.accepted if name in VISIBLE]
        taken = [name for name in self.accepted if name not in VISIBLE]
        return f"works: {', '.join(working) or 'none'}; accepted: {', '.join(taken) or 'none'}"

    @property
    def filler_fields(self) -> Body:
        """Fillers should fill the batch to the end."""
        return self.accepted.get("ignore_eos", {})


async def identify(transport: Transport, model: str) -> Identity:
    """Ask the server what it is, at the addresses where each kind says so."""
    root = transport.root
    models = await transport.get_object(f"{transport.base}/models") or {}
    listed = models.get("data")
    entries = [entry for entry in listed if isinstance(entry, dict)] if listed else []
    entry = next((entry for entry in entries if entry.get("id") == model), {})
    name = str(entry.get("root") or entry.get("id") or model)[:200]
    context = _positive(entry.get("max_model_len"))
    if props := await transport.get_object(f"{root}/props"):
        settings = props.get("default_generation_settings") or {}
        file = str(props.get("model_path") or name)[:200]
        return Identity("llama.cpp", _text(props.get("build_info")), file, _get_context(settings))
    for path in ("/server_info", "/get_server_info"):
        info = await transport.get_object(f"{root}{path}")
        if info and "model_path" in info:
            limit = context or _positive(info.get("max_total_num_tokens"))
            return Identity("SGLang", _text(info.get("version")), str(info["model_path"]), limit)
    version = await transport.get_object(f"{root}/version") or {}
    kind = "vLLM" if entry.get("owned_by") == "vllm" else "OpenAI-compatible server"
    return Identity(kind, _text(version.get("version")), name, context)


async def list_models(transport: Transport) -> list[str]:
    """The names that the server offers; empty if it does not say."""
    models = await transport.get_object(f"{transport.base}/models") or {}
    listed = models.get("data")
    return [str(m.get("id")) for m in listed if isinstance(m, dict)] if listed else []


async def probe(dialect: Dialect, ask: Ask) -> Capabilities:
    """Try every optional field alone, keep those that work, and then try those kept together.

    Raises RequestFailure if the plain request fails, UsageError where kept fields clash.
    """
    plain = await ask({})
    accepted: dict[str, Body] = {}
    for name, fields in dialect.optional.items():
        try:
            answer = await ask(fields)
        except RequestFailure as failure:
            if failure.is_unreachable:
                raise
            continue
        if _shows(name, answer):
            accepted[name] = fields
    kept = Capabilities("text", accepted)
    try:
        answer = await ask(kept.probe_fields)
    except RequestFailure as failure:
        raise UsageError(
            f"the server takes {', '.join(accepted)} one by one but not together: {failure}"
        ) from failure
    compared: Compared = "text"
    if answer.token_ids:
        compared = "token ids"
    elif answer.tokens and "".join(answer.tokens) == answer.text:
        compared = "logprob tokens"
    digits = max(map(_significant_digits, answer.logprobs), default=None)
    return Capabilities(compared, accepted, digits, answer.fingerprint or plain.fingerprint)


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


def _get_context(settings: Any) -> int | None:
    return _positive(settings.get("n_ctx")) if isinstance(settings, dict) else None


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)[:200]
