"""A batch that stays exactly as it was asked for: rows, slots, padding, and cache state."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from ndcheck.errors import UsageError
from ndcheck.load import N_PREFILL_CHUNKS as N_PREFILL_CHUNKS
from ndcheck.records import CacheState

LayerState = tuple[Tensor, ...]


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
        self._cache_argument = cache_argument(model)
        self._has_states = any(isinstance(x, LinearAttentionLayer) for x in self.cache.layers)
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
        self._length = 0
        self.row_counts.clear()

    def prefill(self, cache_state: CacheState, cut: int | None = None) -> Tensor:
        """Logits after the prompt, [rows, vocabulary]; ``cut`` is that of a `Load`."""
        padded = torch.tensor(
            [[0] * (self._n_columns - len(row)) + row for row in self._rows], device=self.device
        )
        start = 0
        if cache_state == "prefix":
            start = self._load_prefix(cut)
        n_chunks = N_PREFILL_CHUNKS if cache_state == "chunked" else 1
        chunk = -(-(self._n_columns - start) // n_chunks)
        if cache_state == "chunked" and cut is not None:
            chunk = cut
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
        self._length += input_ids.shape[1]
        mask = self._mask
        if self._has_states:
            # Recurrent layers take the last columns of the mask for those of the input.
            mask = mask[:, : self._length]
        logits = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self.cache},
        ).logits
        self.row_counts.append(logits.shape[0])
        return torch.as_tensor(logits[:, -1])

    def _load_prefix(self, n_rest: int | None) -> int:
        """Fill the cache with each row's own prefix, computed alone; columns filled.

        All but the last ``n_rest`` tokens of a row, or half of the shortest row, are prefix, so
        every row has a rest to prefill.
        """
        shortest = min(map(len, self._rows))
        n_rest = max(1, shortest // 2) if n_rest is None else min(n_rest, shortest)
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
        row = list(prefix) or [0]
        batch = ExactBatch(self._model, self.device, 1, len(row))
        batch.reset([row])
        batch.prefill("whole")
        n_tokens = max(1, len(prefix))
        states: list[LayerState] = []
        for layer in batch.cache.layers:
            state = layer_states(layer)
            if isinstance(layer, LinearAttentionLayer):
                states.append(state if prefix else tuple(torch.zeros_like(s) for s in state))
            else:
                states.append(tuple(part[:, :, :n_tokens] for part in state))
        return states


def layer_states(layer: Any) -> LayerState:
    """Keys and values of a cache's layer, or its convolution's last inputs and recurrent state."""
    if isinstance(layer, LinearAttentionLayer):
        return layer.conv_states[0], layer.recurrent_states[0]
    return layer.keys, layer.values


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
