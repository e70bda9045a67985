"""What an answer holds beside what is compared, by field: equal completions have the same there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

Beside = dict[str, str]

REASONING = (
    *("reasoning_content", "reasoning", "thinking", "reasoning_text"),
    *("reasoning_details", "thinking_blocks"),
)
"""Where servers put it; those that use several fields say the same in each."""
PARTS = ("text", "content", "thinking", "refusal", "value", "output_text", "summary", "transcript")
"""Where the parts of a content have their text."""
_READ = frozenset((*REASONING, "content", "text", "refusal", "tool_calls", "function_call"))
_HOLDERS = (*PARTS, "function", "custom", "arguments")
_MADE_UP = re.compile(
    r"(^|_)(id|ids|role|type|format|time|date|created|expires|signature|obfuscation|padding|nonce)"
    r"(_|$)|encrypted"
)
"""Fields that are others in every answer, or that name the kind of what is beside them."""
_ENDS = ("finish_reason", "stop_reason", "matched_stop", "native_finish_reason", "stop_sequence")
MAX_FIELDS = 8
MAX_NAME = 40
MAX_DEPTH = 6


def ends_of(choice: Mapping[str, Any]) -> Beside:
    """What a choice says of its end: servers have several words, and tokens, for one reason."""
    reason = choice.get("finish_reason")
    matched = reason.get("matched") if isinstance(reason, dict) else None
    said = {name: choice.get(name) for name in _ENDS} | {"matched": matched}
    return {name: str(x) for name, x in said.items() if x != "" and isinstance(x, str | int)}


def unread(part: Mapping[str, Any]) -> Beside:
    """The texts of a message that are not compared; its numbers may be clocks, and are left out."""
    found: Beside = {}
    for key, value in part.items():
        for item in value if isinstance(value, list) else [value]:
            is_dict = isinstance(item, dict)
            if key in _READ and not (is_dict and not any(item.get(name) for name in _HOLDERS)):
                continue
            for field, text in _texts(item, _name(key), MAX_DEPTH):
                found[field] = found.get(field, "") + text
    return {field: found[field] for field in sorted(found)[:MAX_FIELDS]}


def _texts(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    if _MADE_UP.search(name.rpartition(".")[2]) or not depth:
        return
    if isinstance(value, str) and value:
        yield name[:MAX_NAME], value
    for item in value if isinstance(value, list) else ():
        yield from _texts(item, name, depth - 1)
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from _texts(item, f"{name}.{_name(key)}", depth - 1)


def _name(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "", key)


def add(beside: Beside, more: Beside) -> None:
    """Take in what the next event says: a text goes on, and an end may be said once more."""
    for field, text in more.items():
        before = beside.get(field, "")
        is_said = before == text and (field in _ENDS or field == "matched")
        beside[field] = before if is_said else before + text


def fields_of(beside: Beside) -> str:
    """The names of the fields, but for those that say how a completion ended."""
    return ", ".join(field for field in beside if field not in (*_ENDS, "matched"))


def digest(beside: Beside) -> str:
    """Each field's name and 8 hexadecimal digits over its text, in one line."""
    return " ".join(f"{field}={_digest(text)}" for field, text in sorted(beside.items()))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
