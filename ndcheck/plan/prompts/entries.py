"""One entry of a file of prompts: a text, a conversation, or a request that holds one."""

from __future__ import annotations

import math
import reprlib
from typing import Any, NamedTuple

from ndcheck.probe import Message, Prompt, Speaker
from ndcheck.storage.reading import is_unicode


class Entry(NamedTuple):
    """A prompt with its id and the right answer, where it has them."""

    name: str | None
    prompt: Prompt
    answer: str | None = None


HOLDERS = ("prompt", "messages", "conversations", "body")
"""Fields of which one holds the prompt; ``body`` is that of a request in an OpenAI batch."""
IDS = ("custom_id", "id")
SYSTEM = "system"
SYSTEMS = (SYSTEM, "system_prompt", "system_message", "systemPrompt")
ANSWER = "answer"
PROMPT_CHANGING = (
    *("tools", "functions", "chat_template_kwargs"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
BESIDE_PROMPT = (
    *("suffix", "prefix", "history", "documents", "chat_template"),
    *("continue_final_message", "reasoning_effort"),
)
"""What changes a prompt too, and of other rows may be a column like any other."""
INSTRUCTION, INPUT = "instruction", "input"
"""Alpaca's prompt is both."""
NOTHING = ("[]", "{}", "null")
"""What a table, or LLaMA-Factory, has where there is none."""
REQUEST_CHANGING = (
    *("suffix", "previous_response_id", "conversation"),
    *("reasoning", "thinking", "enable_thinking"),
)
MESSAGE_CHANGING = ("tool_calls", "function_call", "name", "audio", "images", "prefix", "partial")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Of an earlier turn some chat templates repeat it."""
TEXT_PARTS = ("text", "input_text", "output_text")
FIELDS = (*HOLDERS, *IDS, *SYSTEMS, ANSWER, *PROMPT_CHANGING, *BESIDE_PROMPT, INPUT)
"""All that an entry is read for."""
ROLES: dict[str, Speaker] = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bing", "bard"), "assistant"),
}
ACCEPTED = (
    'give a string, {"prompt": "..."}, {"messages": [{"role": ..., "content": ...}, ...]}, '
    '{"conversations": [{"from": ..., "value": ...}, ...]} or a request of an OpenAI batch, or '
    "name the field with --prompt-column"
)


def read_entry(value: Any, column: str | None = None) -> Entry:
    """The id and the prompt of an entry; ``column`` names the field that holds the prompt.

    Answers at the end of a conversation are left out, since the model is to give one; of a request
    its messages or its prompt are read, and none of its settings. Raises ValueError.
    """
    if not isinstance(value, dict):
        if column is not None:
            raise ValueError(f"it has no field {column!r}")
        return Entry(None, _read_prompt(value))
    answer = None if column == ANSWER else _read_answer(value.get(ANSWER))
    return Entry(_read_id(value), _read_fields(value, column), answer)


def is_conversation(value: Any) -> bool:
    """Is it a list of turns, each with who speaks?"""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and not turn.keys().isdisjoint(("role", "from"))
            for turn in value
        )
    )


def _read_id(fields: dict[str, Any]) -> str | None:
    name = next((fields[key] for key in IDS if fields.get(key) not in (None, "")), None)
    if name is None:
        return None
    if type(name) not in (str, int) or not is_unicode(str(name)):
        raise ValueError("id: give a text or a whole number")
    return str(name)


def _read_answer(value: Any) -> str | None:
    """The right answer; None of what is no text and no number, which need not be one."""
    if isinstance(value, str):
        return value.strip() or None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number and math.isfinite(value) else None


def _read_fields(fields: dict[str, Any], column: str | None) -> Prompt:
    beside = BESIDE_PROMPT if column is None else (INPUT,) if column == INSTRUCTION else ()
    for name in (*PROMPT_CHANGING, *beside):
        if fields.get(name) and fields[name] not in NOTHING:
            raise ValueError(f"{name}: it changes the prompt and is not read: leave it out")
    systems = [fields[name] for name in SYSTEMS if fields.get(name)]
    if len(systems) > 1:
        raise ValueError(f"it holds two system prompts: give one as {SYSTEM}")
    system = systems[0] if systems else None
    if column is not None:
        if column not in fields:
            raise ValueError(f"it has no field {column!r}")
        return _with_system(_read_prompt(fields[column]), system)
    holders = [name for name in HOLDERS if fields.get(name) is not None]
    if len(holders) > 1:
        raise ValueError(f"it holds {' and '.join(holders)}: choose one with --prompt-column")
    if not holders:
        raise ValueError(ACCEPTED)
    (holder,) = holders
    if holder == "body":
        return _read_request(fields["body"], fields.get("url"))
    if holder != "prompt" and not isinstance(fields[holder], list):
        raise ValueError(f"{holder}: {reprlib.repr(fields[holder])} is no list of messages")
    return _with_system(_read_prompt(fields[holder]), system)


def _read_request(body: Any, url: Any) -> Prompt:
    if not isinstance(body, dict) or body.get("body") is not None:
        raise ValueError('body: give a request, {"messages": [...]} or {"prompt": "..."}')
    for name in REQUEST_CHANGING:
        if body.get(name):
            raise ValueError(f"body: {name}: it changes the prompt and is not read: leave it out")
    if isinstance(url, str) and url.rstrip("/").endswith("/responses"):
        asked = body.get("input")
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        body = {**body, "messages": messages, SYSTEM: body.get("instructions")}
    *_, last = body.get("messages") or [None]
    if isinstance(last, dict) and last.get("role") == "assistant":
        raise ValueError(
            "body: its last message is the assistant's, to be gone on with: end with the user's"
        )
    return _read_fields(body, None)


def _with_system(prompt: Prompt, system: Any) -> Prompt:
    if system is None:
        return prompt
    if isinstance(prompt, str):
        prompt = (Message("user", prompt),)
    if any(message.role == "system" for message in prompt):
        raise ValueError("system: the conversation has a system prompt already")
    return (Message("system", _read_text(system, "the system prompt")), *prompt)


def _read_prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return _read_text(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{reprlib.repr(value)} is no prompt: {ACCEPTED}")
    messages = [_read_message(turn) for turn in value]
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages or messages[-1].role != "user":
        raise ValueError("no message of the user's is there to be answered at its end")
    for turn in value[: len(messages)]:
        for name in REASONING:
            if turn.get(name):
                raise ValueError(f"{name}: a message that is more than a text is not read")
    return tuple(messages)


def _read_message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{reprlib.repr(turn)} is no message: {ACCEPTED}")
    who = turn.get("role", turn.get("from"))
    role = ROLES.get(who) if isinstance(who, str) else None
    if role is None:
        raise ValueError(f"role {reprlib.repr(who)} is not accepted; give {', '.join(ROLES)}")
    for name in MESSAGE_CHANGING:
        if turn.get(name):
            raise ValueError(f"{name}: a message that is more than a text is not read")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") in TEXT_PARTS for part in content):
            raise ValueError("content: a message that is more than a text is not read")
        return Message(role, "".join(_read_text(part.get("text")) for part in content))
    return Message(role, _read_text(content, f"the {who} message"))


def _read_text(value: Any, what: str = "the prompt") -> str:
    if not isinstance(value, str):
        raise ValueError(f"{reprlib.repr(value)} is no text: {ACCEPTED}")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    if not is_unicode(value):
        raise ValueError(f"{what} holds half a character, which is not valid UTF-8")
    return value
