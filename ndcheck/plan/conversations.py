"""A prompt is a text or a conversation: what can be asked of either."""

from __future__ import annotations

from dataclasses import replace

from ndcheck.probe import Message, Prompt


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """The messages of a chat request; a text is the user's."""
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return [{"role": message.role, "content": message.content} for message in messages]


def as_text(prompt: Prompt) -> str:
    """A text as it is, a conversation with the role before each message: another for each."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)


def continued(prompt: Prompt, words: str) -> Prompt:
    """The prompt with words after it, in the same message."""
    if isinstance(prompt, str):
        return f"{prompt} {words}"
    *before, last = prompt
    return (*before, replace(last, content=f"{last.content} {words}"))
