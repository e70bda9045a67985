"""What goes with requests as a user gives it, and as a record may hold it: without secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ndcheck.errors import UsageError
from ndcheck.samplers.endpoint.redaction import MASK, SHORTEST_UNBOUNDED
from ndcheck.samplers.options import compact, parse_object
from ndcheck.storage.reading import is_unicode

SET_ELSEWHERE = {
    "model": "--model",
    **dict.fromkeys(("prompt", "messages", "input"), "--prompt or --prompts-file"),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), "--max-tokens"),
    "temperature": "--temperature or --no-temperature",
    "seed": "--seed",
    "stop": "--stop",
}
"""Fields of a request that have options of their own."""
FIXED = ("stream", "n", "best_of")
"""One streamed completion a request is what ndcheck reads."""
FRAMING = re.compile(
    r"(?:content-(?:length|encoding)|transfer-encoding|connection|te|expect)", re.I
)
"""Headers that say how a request's own bytes are sent."""
_SECRET_NAME = re.compile(
    r"(?:(?:key|secret|password|passwd|passphrase|credential|cookie|connection_?string)s?|token)$"
    r"|(?:^|[\W_])(?:authorization|auth|bearer|signature|sig|sas|jwt|pwd|pat|pin)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"(?:Bearer |Basic |sk[-_]|hf_|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|gsk_|xai-|nvapi-|eyJ"
    r"|AKIA|AIza|-----BEGIN )\S"
    r"|.*(?://[^/\s@]+@|[?&;](?:accountkey|sig|[\w-]*(?:key|token|secret))=)\S",
    re.IGNORECASE | re.DOTALL,
)
NAMED_BY_SCHEMAS = ("properties", "$defs", "definitions")
"""What a JSON schema calls a password is described there, not given."""
_VERSION = re.compile(r"(?:.*[-_.~$])?(?:api)?version", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Private:
    """What goes with every request to a server and may be secret: no record holds it as it is."""

    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)


def parse_headers(headers: Sequence[str]) -> dict[str, str]:
    """``"Name: value"`` lines by name. Raises UsageError without repeating a value."""
    parsed = {}
    for header in headers:
        name, colon, value = header.partition(":")
        if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name.strip()):
            raise UsageError("--header: give it as 'Name: value'")
        if not value.strip().isascii() or not value.strip().isprintable():
            raise UsageError(f"--header {name.strip()}: the value holds characters HTTP refuses")
        if FRAMING.fullmatch(name.strip()):
            raise UsageError(f"--header {name.strip()}: ndcheck needs it as it is")
        parsed[name.strip()] = value.strip()
    return parsed


def parse_query(texts: str | Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` by key. Raises UsageError without repeating a value."""
    parsed: dict[str, str] = {}
    for text in [texts] if isinstance(texts, str) else texts:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[0-9A-Za-z._~$-]+", key) or not value:
            raise UsageError("--query: give it as KEY=VALUE, such as api-version=2024-10-21")
        if key in parsed:
            raise UsageError(f"--query {key}: it is given twice")
        if not is_unicode(value) or not value.isprintable():
            raise UsageError(f"--query {key}: the value is no printable text")
        parsed[key] = value
    return parsed


def recorded_query(texts: str | Sequence[str]) -> tuple[str, ...]:
    """What a record holds: a version with its value, the name alone of all that may be secret."""
    query = parse_query(texts)
    return tuple(f"{k}={v}" if _VERSION.fullmatch(k) else k for k, v in query.items())


def query_secrets(query: Mapping[str, str], recorded: Sequence[str]) -> Iterator[str]:
    """The values that a record leaves out, but for short ones of plain names: words of answers."""
    for name, value in query.items():
        is_short = len(value) < SHORTEST_UNBOUNDED and not _SECRET_NAME.search(name)
        if f"{name}={value}" not in recorded and not is_short:
            yield value


def parse_extra_body(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of an object of JSON, or of the file after ``@``; none of None.

    Raises UsageError for what is none, and for a field that ndcheck sets.
    """
    if given is None:
        return {}
    fields = parse_object("--extra-body", given)
    for name in fields:
        if name in SET_ELSEWHERE:
            raise UsageError(f"--extra-body {name}: give {SET_ELSEWHERE[name]} instead")
        if name in FIXED:
            raise UsageError(f"--extra-body {name}: ndcheck needs it as it is")
    return fields


def recorded_body(given: str | Mapping[str, Any] | None) -> str | None:
    """The same as a record holds it: compact JSON, and a mask for what may be a secret."""
    fields = parse_extra_body(given)
    return compact(_masked(fields)) if fields else None


def secrets_of(value: Any, *, is_secret: bool = False, holder: str = "") -> Iterator[str]:
    """The texts in a request that `recorded_body` masks, and its numbers that are not short.

    ``holder`` is the name of what holds ``value``.
    """
    if isinstance(value, str) and (is_secret or _SECRET_VALUE.match(value)):
        yield value
    elif is_secret and _is_number(value) and len(str(value)) >= SHORTEST_UNBOUNDED:
        yield str(value)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            is_hidden = is_secret or _hides(name, holder)
            yield from secrets_of(item, is_secret=is_hidden, holder=name)
    elif isinstance(value, list):
        for item in value:
            yield from secrets_of(item, is_secret=is_secret)


def is_secret_setting(name: str, value: str) -> bool:
    """Does a setting look as if its value must be in no record?"""
    return bool(_SECRET_NAME.search(name) or _SECRET_VALUE.match(value))


def _masked(value: Any, *, is_secret: bool = False, holder: str = "") -> Any:
    if isinstance(value, Mapping):
        return {
            name: _masked(item, is_secret=is_secret or _hides(name, holder), holder=name)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_masked(item, is_secret=is_secret) for item in value]
    is_masked = is_secret and _is_number(value)
    return MASK if is_masked or any(secrets_of(value, is_secret=is_secret)) else value


def _hides(name: str, holder: str) -> bool:
    return holder not in NAMED_BY_SCHEMAS and bool(_SECRET_NAME.search(name))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
