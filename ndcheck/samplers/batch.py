"""A batch that stays exactly as it was asked for: rows, slots, padding, and cache state."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from ndcheck.errors import UsageError
from ndcheck.records import CacheState

N_PREFILL_CHUNKS = 3

LayerState = tuple[Tensor, ...]


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
        # BLOOM makes its bias of the mask, which must then be as long as the static cache.
        self._mask_is_whole = model.config.model_type == "bloom"
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=width)
        self._cache_argument = cache_argument(model)
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
        mask = self._mask[:, :end]
        if self._mask_is_whole:
            mask = torch.nn.functional.pad(mask, (0, self._mask.shape[1] - end))
        logits = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=(columns - self._pads[:, None]).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self.cache},
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
        states: list[list[LayerState]] = []
        alone: dict[tuple[int, ...], list[LayerState]] = {}
        for row in self._rows:
            prefix = tuple(row[: len(row) - n_rest])
            if prefix not in alone:
                alone[prefix] = self._prefix_states(prefix)
            states.append(alone[prefix])
        for layer, layer_states in enumerate(zip(*states, strict=True)):
            parts = zip(*layer_states, strict=True)
            if isinstance(self.cache.layers[layer], LinearAttentionLayer):
                convolution, recurrent = map(torch.cat, parts)
                self.cache.update_conv_state(convolution, layer)
                self.cache.update_recurrent_state(recurrent, layer)
            else:
                keys, values = (torch.cat([_pad_left(s, n_prefix) for s in p]) for p in parts)
                self.cache.update(keys, values, layer)
        self._length = n_prefix
        return n_prefix

    def _prefix_states(self, prefix: tuple[int, ...]) -> list[LayerState]:
        """What every layer keeps of a prefix computed alone.

        Keys and values, each [1, heads, tokens, head_dim], the last ones only where a window hides
        the others; or the last inputs of a convolution and a recurrent state.
        """
        # A row as short as the rest: one padded column gives the shapes, and is masked.
        batch = ExactBatch(self._model, self._device, [list(prefix) or [0]], 0)
        batch.prefill("whole")
        n_tokens = max(1, len(prefix))
        states: list[LayerState] = []
        for layer in batch.cache.layers:
            if isinstance(layer, LinearAttentionLayer):
                state = layer.conv_states[0], layer.recurrent_states[0]
                states.append(state if prefix else tuple(torch.zeros_like(s) for s in state))
            else:
                states.append((layer.keys[:, :, :n_tokens], layer.values[:, :, :n_tokens]))
        return states


def cache_argument(model: Any) -> str:
    """The name under which a model takes its cache. Raises UsageError if it takes none known."""
    accepted = inspect.signature(model.forward).parameters
    for name in ("past_key_values", "cache_params"):
        if name in accepted:
            return name
    raise UsageError(
        f"{type(model).__name__} takes neither past_key_values nor cache_params, so the state that "
        "it decodes from cannot be controlled"
    )


def _pad_left(states: Tensor, n_columns: int) -> Tensor:
    """[1, heads, tokens, head_dim] to [1, heads, n_columns, head_dim]."""
    return torch.nn.functional.pad(states, (0, 0, n_columns - states.shape[-2], 0))
