"""From prompts and loads to token ids, and from token ids back to text."""

from __future__ import annotations

import functools
import inspect
import random
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ndcheck.errors import UsageError, first_line
from ndcheck.plan.conversations import as_messages
from ndcheck.plan.fillers import filler_text, fit_to_length
from ndcheck.probe import Message, Prompt
from ndcheck.records import Load, Probe, RunSpec
from ndcheck.samplers.base import Rendered
from ndcheck.samplers.local.checkpoint.bounds import bounded
from ndcheck.samplers.local.loading import load_tokenizer
from ndcheck.storage.reading import parse_json

TEMPLATE_S = 2
CLOCK, DATE = "strftime_now", "date_string"
"""What gives chat templates the date, and what Llama's take in its place."""
OTHER = " 7"
"""What makes another message of any."""
TEMPLATE_VARIABLES = {"tools", "documents"}


class Prompts:
    """A tokenizer, with the chat template if one is wanted."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool,
        source: str,
        n_ids: int | None,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        self._tokenizer = tokenizer
        self._template_kwargs = template_kwargs
        self._chat = chat
        self._source = source
        self._n_ids = n_ids
        self._encoded: dict[Prompt, array[int]] = {}

    def rows(self, load: Load, probe: Probe) -> list[list[int]]:
        """Token ids of every row of the batch: probes at their slots, fillers elsewhere."""
        probe_ids = self.encode(probe.content)
        fillers = iter(enumerate(load.filler_lengths))
        rows = []
        for row in range(load.batch_size):
            if row in load.slots:
                rows.append(probe_ids)
            else:
                i, length = next(fillers)
                rows.append(self.filler(load.filler_seed + i, length))
        return rows

    def filler(self, seed: int, length: int) -> list[int]:
        """A filler of exactly ``length`` tokens, a function of ``seed`` and the tokenizer."""
        return fit_to_length(self._ids(self._tokenizer(filler_text(seed, length))), length)

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt as the model sees it, the same each time.

        Raises UsageError where the chat template or the tokenizer does not give ids of the model.
        """
        # A template may say what day it is, and a tokenizer may draw: one prompt is measured.
        if prompt not in self._encoded:
            self._encoded[prompt] = array("q", self._encode(prompt))
        return self._encoded[prompt].tolist()

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) and not self._chat:
            return self._ids(self._tokenizer(prompt))
        with bounded(f"--chat: the chat template of {self._source}", TEMPLATE_S):
            try:
                encoded = self._tokenizer.apply_chat_template(
                    as_messages(prompt),
                    add_generation_prompt=True,
                    return_dict=True,
                    **self._template_kwargs,
                )
            except MemoryError:
                raise
            except Exception as error:
                raise UsageError(
                    f"--chat: the chat template of {self._source} raises "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
        return self._ids(encoded)

    def _ids(self, encoded: Any) -> list[int]:
        ids = list(encoded["input_ids"])
        if self._n_ids is not None and ids and not 0 <= min(ids) <= max(ids) < self._n_ids:
            raise UsageError(
                f"--model {self._source}: its tokenizer gives token {max(ids)}, and the model's "
                f"vocabulary has {self._n_ids}: they are not of one model"
            )
        return ids

    def render(self, prompt: Prompt) -> Rendered:
        """The prompt as the model sees it."""
        ids = self.encode(prompt)
        tokens = tuple((token_id, self.decode(token_id)) for token_id in ids)
        return Rendered(str(self._tokenizer.decode(ids)), tokens)

    def warnings(self, probes: Sequence[Probe]) -> tuple[str, ...]:
        """What is likely to be wrong with prompts, a sentence for each kind."""
        found = []
        first = self._tokenizer.bos_token_id
        twice = [p.probe_id for p in probes if self.encode(p.content)[:2] == [first, first]]
        if twice:
            others = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
            found.append(
                f"warning: prompt {twice[0]}{others} begins with {self._tokenizer.bos_token!r} "
                "twice: leave it out where the tokenizer or the chat template adds it"
            )
        has_clock = self._chat and CLOCK in str(self._tokenizer.chat_template)
        if has_clock and DATE not in self._template_kwargs:
            found.append(
                "warning: the chat template may say the date, and then has other tokens on another "
                f'day: many take --chat-template-kwargs \'{{"{DATE}": "26 Jul 2024"}}\''
            )
        found += (
            f"warning: the chat template leaves out what the {role} says"
            for role in self._unread_roles(probes)
        )
        return tuple(found)

    def _unread_roles(self, probes: Sequence[Probe]) -> list[str]:
        """Whose messages the chat template leaves out: the first probe that has such one tells.

        Raises UsageError where it is the user's.
        """
        firsts: dict[str, tuple[Message, ...]] = {}
        for probe in probes if self._chat else ():
            messages = probe.messages or (Message("user", probe.prompt),)
            for message in messages:
                firsts.setdefault(message.role, messages)
        unread = []
        for role, messages in firsts.items():
            others = (
                replace(m, content=m.content + OTHER) if m.role == role else m for m in messages
            )
            if self._encode(messages) == self._encode(tuple(others)):
                unread.append(role)
        if "user" in unread:
            raise UsageError(f"--chat: the chat template of {self._source} leaves out the prompt")
        return unread

    def decode(self, token_id: int) -> str:
        """The text of one token."""
        return str(self._tokenizer.decode([token_id]))

    @functools.lru_cache(maxsize=1024)  # noqa: B019  one sampler lives as long as the process
    def token_texts(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        """What each token adds to the decoded text; "" inside a character of several tokens."""
        texts: list[str] = []
        shown = start = 0
        for end in range(1, len(token_ids) + 1):
            text = self._tokenizer.decode(token_ids[start:end])
            if text.endswith("\ufffd") and end < len(token_ids):
                texts.append("")
                continue
            texts.append(text[shown:])
            # Keep a few tokens as context: some tokenizers drop a leading space after none.
            start = max(start, end - 4)
            shown = len(self._tokenizer.decode(token_ids[start:end]))
        return tuple(texts)


def load_prompts(source: str, spec: RunSpec, text_config: Any = None) -> Prompts:
    """The prompts of a tokenizer whose ids are in the vocabulary of a model's ``text_config``.

    Raises UsageError if it has none that serves.
    """
    tokenizer = load_tokenizer(source, spec)
    if spec.chat and not tokenizer.chat_template:
        raise UsageError(
            f"--chat, and conversations, need a chat template, and {source} has no chat template"
        )
    n_ids = getattr(text_config, "vocab_size", None)
    template_kwargs = parse_json(spec.chat_template_kwargs or "{}")
    # What the method takes itself is no variable of the template.
    taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"kwargs"}
    if clash := sorted(taken & template_kwargs.keys() - TEMPLATE_VARIABLES):
        raise UsageError(f"--chat-template-kwargs {clash[0]}: ndcheck needs it as it is")
    return Prompts(
        tokenizer, chat=spec.chat, source=source, n_ids=n_ids, template_kwargs=template_kwargs
    )


def plain_ids(model: Any, n_ids: int) -> list[int]:
    """Token ids that are a word's like any other, as far as the config names those that are not."""
    config = model.config.get_text_config(decoder=True)
    special = set()
    for source in (model.config, config):
        for name, value in source.to_dict().items():
            if re.search(r"token_(id|index)", name):
                special.update(value if isinstance(value, list) else [value])
    n_known = getattr(config, "vocab_size", None) or 1
    ids = [i for i in range(min(n_known, 1 << 15)) if i not in special] or [0]
    return random.Random(0).choices(ids, k=n_ids)
