"""What is measured: a prompt, which is a text or a conversation, and a load that it is under."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ndcheck.storage.ranges import Count, Positive, Seed

CacheState = Literal["whole", "chunked", "prefix"]
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


@dataclass(frozen=True, slots=True)
class Load:
    """How the probe's rows are batched.

    ``slots`` are the rows that hold the probe (all of them in mode ``copies``). The other rows
    hold fillers of ``filler_lengths`` tokens, in row order, whose contents are drawn from
    ``filler_seed``. ``cache_state`` says how the prompt enters the KV cache: ``whole`` in one
    forward pass, ``chunked`` in several passes, or after a ``prefix`` that was computed alone.
    ``cut`` is a number of tokens: of each chunk, or of what follows the prefix. None leaves it to
    the sampler.

    With a ``width`` above 1, or where it ``scores``, nothing is generated: what each row completes
    under the same load decoded is fed to the model again, in passes of ``width`` tokens over the
    row's own cache, or together with the prompt, of which ``cache_state`` and ``cut`` then say how
    both enter.
    """

    batch_size: Positive
    slots: tuple[Count, ...] = (0,)
    filler_lengths: tuple[Count, ...] = ()
    filler_seed: Seed = 0
    cache_state: CacheState = "whole"
    cut: Positive | None = None
    width: Positive = 1
    scores: bool = False

    @property
    def is_fed(self) -> bool:
        """Does it take a completion as given, instead of generating one?"""
        return self.width > 1 or self.scores

    @property
    def decoded(self) -> Load:
        """The load whose completion this one is fed."""
        if self.scores:
            return replace(self, scores=False, cache_state="whole", cut=None)
        return replace(self, width=1)


ALONE = Load(1)
"""The probe alone, prefilled as a whole: the load of the reference."""
