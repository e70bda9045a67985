"""What is measured: a prompt, which is a text or a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Speaker = Literal["system", "developer", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Speaker
    content: str


Prompt = str | tuple[Message, ...]
"""What a model is asked: a text, or the messages of a conversation."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt being measured.

    ``messages`` are those of a conversation, the user's last; ``prompt`` is then the text of that
    one, to tell the probe by. ``answer`` is the right one, where it is known.
    """

    probe_id: str
    prompt: str
    messages: tuple[Message, ...] = ()
    answer: str | None = None

    @property
    def content(self) -> Prompt:
        """What the model is asked."""
        return self.messages or self.prompt
