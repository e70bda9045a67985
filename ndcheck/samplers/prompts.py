"""From prompts and loads to token ids, and from token ids back to text."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from ndcheck.builtin import MODEL_DIRECTORY
from ndcheck.errors import BackendError, UsageError
from ndcheck.load import filler_text, fit_to_length
from ndcheck.records import Load, Probe, RunSpec


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
                text = filler_text(load.filler_seed + i, length)
                rows.append(fit_to_length(self._tokenizer(text)["input_ids"], length))
        return rows

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
    options = {"trust_remote_code": spec.trust_remote_code}
    tokenizer = _load_tokenizer(_tokenizer_source(source, spec), options)
    if spec.chat and not tokenizer.chat_template:
        raise UsageError(f"--chat: {source} has no chat template")
    return Prompts(tokenizer, chat=spec.chat)


@contextmanager
def one_line_errors(source: str) -> Iterator[None]:
    """Loading fails in many ways; each becomes one line that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(
            f"--model {source}: {first_line(error)} "
            "(accepted: builtin, a directory with config.json and safetensors, or a hub id)"
        ) from error
    except RuntimeError as error:
        raise BackendError(f"cannot load {source}: {first_line(error)}") from error


def _load_tokenizer(source: str, options: dict[str, Any]) -> Any:
    with one_line_errors(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    if not tokenizer("a")["input_ids"]:
        raise UsageError(f"--model {source}: it has no tokenizer that gives tokens")
    return tokenizer


def _tokenizer_source(source: str, spec: RunSpec) -> str:
    """A bare config.json has no tokenizer; random weights speak no language, so any will do."""
    directory = Path(source)
    is_bare = directory.is_dir() and not any(directory.glob("tokenizer*"))
    return str(MODEL_DIRECTORY) if spec.random_weights is not None and is_bare else source


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
