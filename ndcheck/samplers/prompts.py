"""From prompts and loads to token ids, and from token ids back to text."""

from __future__ import annotations

import functools
from typing import Any

from ndcheck.errors import UsageError
from ndcheck.load import filler_text, fit_to_length
from ndcheck.records import Load, Probe, RunSpec
from ndcheck.samplers.loading import load_tokenizer


class Prompts:
    """A tokenizer, with the chat template if one is wanted."""

    def __init__(self, tokenizer: Any, *, chat: bool) -> None:
        self._tokenizer = tokenizer
        self._chat = chat

    def rows(self, load: Load, probe: Probe) -> list[list[int]]:
        """Token ids of every row of the batch: probes at their slots, fillers elsewhere."""
        probe_ids = self.encode(probe.prompt)
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
        return fit_to_length(self._tokenizer(filler_text(seed, length))["input_ids"], length)

    def encode(self, prompt: str) -> list[int]:
        """The prompt as the model sees it."""
        if not self._chat:
            return list(self._tokenizer(prompt)["input_ids"])
        message = [{"role": "user", "content": prompt}]
        encoded = self._tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

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


def load_prompts(source: str, spec: RunSpec) -> Prompts:
    """The prompts of a model's tokenizer. Raises UsageError if it has none that serves."""
    tokenizer = load_tokenizer(source, spec)
    if spec.chat and not tokenizer.chat_template:
        raise UsageError(f"--chat: {source} has no chat template")
    return Prompts(tokenizer, chat=spec.chat)
