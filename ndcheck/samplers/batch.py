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
    """A left-padded batch over a static KV cache; counts the rows of every forward pass."""

    def __init__(
        self, model: Any, device: torch.device, rows: list[list[int]], max_tokens: int
    ) -> None:
        self._model = model
        self._device = device
        self._rows = rows
        self._n_columns = max(map(len, rows))
        self._length = 0
        width = self._n_columns + max_tokens
        self._pads = torch.tensor([self._n_columns - len(row) for row in rows], device=device)
        columns = torch.arange(width, device=device)
        self._mask = (columns >= self._pads[:, None]).long()  # [rows, width]
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=width)
        self.row_counts: list[int] = []

    def prefill(self, cache_state: CacheState) -> Tensor:
        """Logits after the prompt, [rows, vocabulary]."""
        padded = torch.tensor(
            [[0] * (self._n_columns - len(row)) + row for row in self._rows], device=self._device
        )
        start = 0
        if cache_state == "prefix":
            start = self._load_prefix()
        n_chunks = N_PREFILL_CHUNKS if cache_state == "chunked" else 1
        chunk = -(-(self._n_columns - start) // n_chunks)
        for begin in range(start, self._n_columns, chunk):
            logits = self._forward(padded[:, begin : begin + chunk])
        return logits

    def step(self, token_ids: Tensor) -> Tensor:
        """Logits after one more token in every row, [rows, vocabulary]."""
        return self._forward(token_ids[:, None])

    def _forward(self, input_ids: Tensor) -> Tensor:
        end = self._length + input_ids.shape[1]
        columns = torch.arange(self._length, end, device=self._device)
        logits = self._model(
            input_ids=input_ids,
            attention_mask=self._mask[:, :end],
            position_ids=(columns - self._pads[:, None]).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self._length = end
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
        self._length = n_prefix
        return n_prefix

    def _prefix_states(self, prefix: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, each [1, heads, tokens, head_dim]."""
        if not prefix:
            # A row as short as the rest: one padded column gives the shapes, and is masked.
            prefix = (0,)
        batch = ExactBatch(self._model, self._device, [list(prefix)], 0)
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
