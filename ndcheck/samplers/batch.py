"""A batch that stays exactly as it was asked for: rows, slots, padding, and cache state."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from ndcheck.errors import TrialError
from ndcheck.records import CacheState

N_PREFILL_CHUNKS = 3


class ExactBatch:
    """A left-padded batch over a static KV cache; counts the rows of every forward pass.

    ``width`` columns hold the prompts and the tokens to come. `reset` takes other rows of the same
    number into the same memory, which a captured step needs.
    """

    def __init__(self, model: Any, device: torch.device, n_rows: int, width: int) -> None:
        self._model = model
        self.device = device
        self.n_rows = n_rows
        self._mask = torch.zeros(n_rows, width, dtype=torch.int64, device=device)
        self._next_positions = torch.zeros(n_rows, 1, dtype=torch.int64, device=device)
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=width)
        self.row_counts: list[int] = []

    @property
    def can_be_captured(self) -> bool:
        """Whether a step's work is all on the device: other caches count tokens in Python."""
        return self.device.type == "cuda" and all(
            type(layer) is transformers.cache_utils.StaticLayer for layer in self.cache.layers
        )

    def reset(self, rows: list[list[int]]) -> None:
        """Take the prompts in, as token ids."""
        self._rows = rows
        self._n_columns = max(map(len, rows))
        pads = torch.tensor([self._n_columns - len(row) for row in rows], device=self.device)
        self._pads = pads[:, None]
        self._mask.copy_(torch.arange(self._mask.shape[1], device=self.device) >= self._pads)
        self._next_positions.copy_(self._n_columns - self._pads)
        self.cache.reset()
        self.row_counts.clear()

    def prefill(self, cache_state: CacheState) -> Tensor:
        """Logits after the prompt, [rows, vocabulary]."""
        padded = torch.tensor(
            [[0] * (self._n_columns - len(row)) + row for row in self._rows], device=self.device
        )
        start = 0
        if cache_state == "prefix":
            start = self._load_prefix()
        n_chunks = N_PREFILL_CHUNKS if cache_state == "chunked" else 1
        chunk = -(-(self._n_columns - start) // n_chunks)
        for begin in range(start, self._n_columns, chunk):
            columns = torch.arange(begin, min(begin + chunk, self._n_columns), device=self.device)
            positions = (columns - self._pads).clamp(min=0)
            logits = self._forward(padded[:, begin : begin + chunk], positions)
        return logits

    def step(self, token_ids: Tensor) -> Tensor:
        """Logits [rows, vocabulary] after one more token [rows] in every row."""
        logits = self._forward(token_ids[:, None], self._next_positions)
        self._next_positions.add_(1)
        return logits

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits = self._model(
            input_ids=input_ids,
            attention_mask=self._mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.row_counts.append(logits.shape[0])
        return torch.as_tensor(logits[:, -1])

    def _load_prefix(self) -> int:
        """Fill the cache with each row's own prefix, computed alone; columns filled.

        All but the last half of the shortest row is prefix, so every row has a rest to prefill.
        """
        n_rest = max(1, min(map(len, self._rows)) // 2)
        n_prefix = self._n_columns - n_rest
        if n_prefix == 0:
            return 0
        states: list[list[tuple[Tensor, Tensor]]] = []
        alone: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for row in self._rows:
            prefix = tuple(row[: len(row) - n_rest])
            if prefix not in alone:
                alone[prefix] = self._prefix_states(prefix)
            states.append(alone[prefix])
        for layer, layer_states in enumerate(zip(*states, strict=True)):
            keys, values = (
                torch.cat([_pad_left(state[i], n_prefix) for state in layer_states])
                for i in range(2)
            )
            self.cache.update(keys, values, layer)
        return n_prefix

    def _prefix_states(self, prefix: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, each [1, heads, tokens, head_dim]."""
        if not prefix:
            # A row as short as the rest: one padded column gives the shapes, and is masked.
            prefix = (0,)
        batch = ExactBatch(self._model, self.device, 1, len(prefix))
        batch.reset([list(prefix)])
        batch.prefill("whole")
        n_tokens = len(prefix)
        states = []
        for layer in batch.cache.layers:
            if layer.keys.shape[-2] < n_tokens:
                raise TrialError(
                    f"cache state prefix: {n_tokens} tokens exceed the model's sliding window"
                )
            states.append((layer.keys[:, :, :n_tokens], layer.values[:, :, :n_tokens]))
        return states


def _pad_left(states: Tensor, n_columns: int) -> Tensor:
    """[1, heads, tokens, head_dim] to [1, heads, n_columns, head_dim]."""
    return torch.nn.functional.pad(states, (0, 0, n_columns - states.shape[-2], 0))
