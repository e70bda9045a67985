"""A batch that stays exactly as it was asked for: rows, slots, padding, and cache state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer, StaticLayer

from ndcheck.errors import NdcheckError, TrialError, UsageError, first_line
from ndcheck.plan.grid import N_PREFILL_CHUNKS
from ndcheck.records import CacheDtype, CacheState, Load

# A state is written in place, or has no length; names, since older releases lack some.
_COUNTED_ON_THE_DEVICE = (
    *("StaticLayer", "Fp8Layer", "DummyLayer"),
    *("LinearAttentionLayer", "LinearAttentionAndStaticFullAttentionLayer"),
)


class ExactBatch:
    """A left-padded batch over a static KV cache; counts the rows of every forward pass.

    ``width`` columns hold the prompts and the tokens to come. `reset` takes other rows of the same
    number into the same memory, which a captured step needs. Raises UsageError for a model whose
    keys and values cannot be kept as ``cache_dtype``.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        n_rows: int,
        width: int,
        cache_dtype: CacheDtype = "auto",
    ) -> None:
        self._model = model
        self.device = device
        self.n_rows = n_rows
        self.width = width
        self._mask = torch.zeros(n_rows, width, dtype=torch.int64, device=device)
        self._next_positions = torch.zeros(n_rows, 1, dtype=torch.int64, device=device)
        self._cache_dtype = cache_dtype
        self.cache = _open_cache(model, width, cache_dtype)
        self._cache_argument = _cache_argument(model)
        self._has_states = any(isinstance(x, LinearAttentionLayer) for x in self.cache.layers)
        self._has_columns = any(hasattr(x, "keys") for x in self.cache.layers)
        self.row_counts: list[int] = []

    @property
    def can_be_captured(self) -> bool:
        """Whether a step's work is all on the device: other caches count tokens in Python."""
        return self.device.type == "cuda" and all(
            type(layer).__name__ in _COUNTED_ON_THE_DEVICE for layer in self.cache.layers
        )

    @property
    def can_capture_passes(self) -> bool:
        """Whether that is so of several tokens too, of which states take columns of the mask."""
        return self.can_be_captured and not self._has_states

    @property
    def can_be_rewound(self) -> bool:
        """Whether tokens can be taken back: other layers sum them up, or write over older ones."""
        return all(type(x) is StaticLayer for x in self.cache.layers)

    @property
    def n_filled(self) -> int:
        """Columns of the cache that hold tokens, or pads before them."""
        return self._length

    def rewind(self, n_columns: int) -> None:
        """Take back all but the first ``n_columns``: the next pass writes over them."""
        self._length = n_columns
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(n_columns)

    def reset(self, rows: list[list[int]]) -> None:
        """Take the prompts in, as token ids."""
        self.rows = rows
        self._n_columns = max(map(len, rows))
        pads = torch.tensor([self._n_columns - len(row) for row in rows], device=self.device)
        self._pads = pads[:, None]
        self._mask.copy_(torch.arange(self._mask.shape[1], device=self.device) >= self._pads)
        self._next_positions.copy_(self._n_columns - self._pads)
        self.cache.reset()
        self._length = 0
        self.row_counts.clear()

    def prefill(self, cache_state: CacheState, cut: int | None = None) -> Tensor:
        """Logits after the prompt, [rows, vocabulary]; ``cut`` is that of a `Load`.

        Raises UsageError where the model computes something else in such a batch than alone.
        """
        self.require_faithful(cache_state)
        return self.compute_prompt(cache_state, cut)

    def require_faithful(self, cache_state: CacheState) -> None:
        """Raise UsageError where the model computes something else in such passes than alone."""
        from ndcheck.samplers.local.faithful import require_faithful

        n_new = self._mask.shape[1] - self._n_columns
        require_faithful(self._model, self.device, list(map(len, self.rows)), n_new, cache_state)

    def compute_prompt(self, cache_state: CacheState, cut: int | None = None) -> Tensor:
        """`prefill`, of whatever model."""
        start = 0
        if cache_state == "prefix":
            start = self._load_prefix(cut)
        for part, n_wanted in self._parts(self._padded(), start, cache_state, cut):
            logits = self.forward(part, max(1, n_wanted))
        return logits[:, -1]

    def feed(self, token_ids: Tensor, load: Load) -> Iterator[Tensor]:
        """Logits [rows, positions, vocabulary] of `fed_passes`, which are of all positions."""
        for part, n_wanted in self.fed_passes(token_ids, load):
            logits = self.forward(part, max(1, n_wanted))
            if n_wanted:
                yield logits

    def fed_passes(self, token_ids: Tensor, load: Load) -> list[tuple[Tensor, int]]:
        """`passes`. Raises UsageError as `prefill` does."""
        # A pass of several tokens over a cache is what a prompt's chunk is.
        self.require_faithful("chunked" if load.width > 1 else load.cache_state)
        return self.passes(token_ids, load)

    def passes(self, token_ids: Tensor, load: Load) -> list[tuple[Tensor, int]]:
        """What ``load`` sends through the model: token ids [rows, columns] of each pass.

        ``token_ids`` [rows, tokens] follow the prompts. With each pass comes of how many of its
        last columns the logits are wanted: of the prompt's last, and of all after it.
        """
        if load.scores:
            fed = torch.cat((self._padded(), token_ids), dim=1)
            return self._parts(fed, 0, load.cache_state, load.cut)
        return [
            *self._parts(self._padded(), 0, load.cache_state, load.cut),
            *((part, part.shape[1]) for part in token_ids.split(load.width, dim=1)),
        ]

    def _padded(self) -> Tensor:
        padded = [[0] * (self._n_columns - len(row)) + row for row in self.rows]
        return torch.tensor(padded, device=self.device)

    def _parts(
        self, token_ids: Tensor, start: int, cache_state: CacheState, cut: int | None
    ) -> list[tuple[Tensor, int]]:
        n_columns = token_ids.shape[1]
        n_chunks = N_PREFILL_CHUNKS if cache_state == "chunked" else 1
        chunk = -(-(n_columns - start) // n_chunks)
        if cache_state == "chunked" and cut is not None:
            chunk = cut
        if self._has_states and bool(self._pads.any()):
            # Recurrent layers take a pass of one column for a token, never for padding.
            chunk = max(2, chunk)
        return [
            (token_ids[:, begin:end], min(end - begin, max(0, end - self._n_columns + 1)))
            for begin in range(start, n_columns, chunk)
            for end in [min(begin + chunk, n_columns)]
        ]

    def forward(self, token_ids: Tensor, n_wanted: int) -> Tensor:
        """Logits [rows, ``n_wanted`` last columns, vocabulary] of a pass over the next columns."""
        begin, n_columns = self._length, token_ids.shape[1]
        columns = torch.arange(begin, begin + n_columns, device=self.device)
        positions = (columns - self._pads).clamp(min=0)
        logits = self._forward(token_ids, positions, n_wanted)
        self._next_positions.copy_(begin + n_columns - self._pads)
        return logits

    def step(self, token_ids: Tensor) -> Tensor:
        """Logits [rows, vocabulary] after one more token [rows] in every row."""
        return self.advance(token_ids[:, None])[:, -1]

    def advance(self, token_ids: Tensor) -> Tensor:
        """Logits [rows, tokens, vocabulary] after token ids [rows, tokens], none of them a pad.

        Where they are in their rows is counted on the device.
        """
        positions, n_tokens = self._next_positions, token_ids.shape[1]
        if n_tokens > 1:
            positions = positions + torch.arange(n_tokens, device=self.device)
        logits = self._forward(token_ids, positions, n_tokens)
        self._next_positions.add_(n_tokens)
        return logits

    def count_pass(self, n_columns: int) -> None:
        """Take a pass that a graph replayed for one that was launched."""
        self._length += n_columns
        self.row_counts.append(self.n_rows)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave out of the count what is captured in here, not executed."""
        length, n_passes = self._length, len(self.row_counts)
        try:
            yield
        finally:
            self._length = length
            del self.row_counts[n_passes:]

    def _forward(self, input_ids: Tensor, position_ids: Tensor, n_wanted: int = 1) -> Tensor:
        """Logits [rows, ``n_wanted`` last columns, vocabulary]."""
        begin, self._length = self._length, self._length + input_ids.shape[1]
        mask = self._mask
        if self._has_states and not (self._has_columns and input_ids.shape[1] == 1):
            # Recurrent layers take the last columns of the mask for those of the input, and some
            # that have no attention beside them all of it. A single token is masked by neither, and
            # a captured step needs a mask of one size.
            mask = mask[:, 0 if self._has_columns else begin : self._length]
        try:
            logits = self._model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=True,
                logits_to_keep=n_wanted,
                **{self._cache_argument: self.cache},
            ).logits
        except (RuntimeError, MemoryError, NdcheckError):
            raise
        except Exception as error:  # Whatever a model's own code raises: the next batch may run.
            what = f"{type(error).__name__}: {first_line(error)}"
            raise TrialError(f"the model raises {what}") from error
        shape = list(logits.shape) if isinstance(logits, Tensor) else []
        if len(shape) != 3 or shape[0] != self.n_rows or shape[1] < n_wanted:
            raise TrialError(
                f"the model gives logits of {shape or type(logits).__name__} where {self.n_rows} "
                f"rows of {n_wanted} are due"
            )
        self.row_counts.append(self.n_rows)
        return logits[:, -n_wanted:]

    def _load_prefix(self, n_rest: int | None) -> int:
        """Fill the cache with each row's own prefix, computed alone; columns filled.

        All but the last ``n_rest`` tokens of a row, or half of the shortest row, are prefix, so
        every row has a rest to prefill.
        """
        shortest = min(map(len, self.rows))
        n_rest = max(1, shortest // 2) if n_rest is None else min(n_rest, shortest)
        n_prefix = self._n_columns - n_rest
        if n_prefix == 0:
            return 0
        alone: dict[tuple[int, ...], list[LayerState]] = {}
        rows: list[list[LayerState]] = []
        for row in self.rows:
            prefix = tuple(row[: len(row) - n_rest])
            if prefix not in alone:
                alone[prefix] = self._prefix_states(prefix)
            rows.append(alone[prefix])
        for layer, states in enumerate(zip(*rows, strict=True)):
            self._fill(layer, states, n_prefix)
        self._length = n_prefix
        return n_prefix

    def _fill(self, layer: int, rows: Sequence[LayerState], n_columns: int) -> None:
        """Put every row's state of one layer into the cache, its columns at the right."""
        columns = [
            torch.cat([_pad_left(part, n_columns) for part in parts])
            for parts in zip(*(row.columns for row in rows), strict=True)
        ]
        if len(columns) > 2:
            self.cache.update_indexer(columns.pop()[:, 0], layer)
        if columns:
            self.cache.update(*columns, layer)
        for update, parts in (
            (self.cache.update_conv_state, [row.convolutions for row in rows]),
            (self.cache.update_recurrent_state, [row.recurrences for row in rows]),
        ):
            for index in parts[0]:
                which = {"state_idx": index} if index else {}
                update(torch.cat([part[index] for part in parts]), layer, **which)

    def _prefix_states(self, prefix: tuple[int, ...]) -> list[LayerState]:
        """What every layer keeps of a prefix computed alone."""
        # A row as short as the rest: one padded column gives the shapes, and is masked.
        row = list(prefix) or [0]
        batch = ExactBatch(self._model, self.device, 1, len(row), self._cache_dtype)
        batch.reset([row])
        batch.compute_prompt("whole")
        states = [layer_state(layer) for layer in batch.cache.layers]
        return [state.cut(len(row)) if prefix else state.emptied() for state in states]


@dataclass(frozen=True, slots=True)
class LayerState:
    """What a cache's layer keeps of the tokens so far.

    ``columns``: keys and values, each [B, heads, tokens, head_dim], the last ones only where a
    window hides the others, and where a layer looks tokens up by an index the keys of that, with
    one head. ``convolutions`` and ``recurrences``: by number, the last inputs of a convolution and
    a recurrent state, [B, ...].
    """

    columns: tuple[Tensor, ...]
    convolutions: dict[int, Tensor]
    recurrences: dict[int, Tensor]

    def cut(self, n_tokens: int) -> LayerState:
        columns = tuple(part[:, :, :n_tokens] for part in self.columns)
        return LayerState(columns, self.convolutions, self.recurrences)

    def emptied(self) -> LayerState:
        """The state before any token, of the same shapes."""
        convolutions = {i: torch.zeros_like(state) for i, state in self.convolutions.items()}
        recurrences = {i: torch.zeros_like(state) for i, state in self.recurrences.items()}
        return LayerState(self.columns, convolutions, recurrences)

    def tensors(self) -> list[Tensor]:
        return [*self.columns, *self.convolutions.values(), *self.recurrences.values()]


def layer_state(layer: Any) -> LayerState:
    """What a layer of a cache keeps; nothing of one that it leaves empty."""
    columns = [getattr(layer, name, None) for name in ("keys", "values", "indexer_keys")]
    if columns[2] is not None:
        columns[2] = columns[2][:, None]
    return LayerState(
        tuple(_widened(part) for part in columns if part is not None),
        _by_number(getattr(layer, "conv_states", None)),
        _by_number(getattr(layer, "recurrent_states", None)),
    )


def _widened(part: Tensor) -> Tensor:
    """Not every torch pads or joins FP8, whose numbers float32 holds."""
    return part.float() if part.dtype == torch.float8_e4m3fn else part


def _by_number(states: Any) -> dict[int, Tensor]:
    """Before transformers 5.17 a layer has one state of a kind, not several by number."""
    by_number = states if isinstance(states, dict) else {0: states}
    return {index: state for index, state in by_number.items() if state is not None}


def _open_cache(model: Any, width: int, dtype: CacheDtype) -> transformers.StaticCache:
    try:
        cache = _FixedLengthCache(config=model.config, max_cache_len=width)
    except (KeyError, ValueError, AttributeError, NotImplementedError) as error:
        raise UsageError(
            f"{type(model).__name__} has a cache of its own, not one of fixed length: "
            f"{type(error).__name__}: {error}"
        ) from error
    if dtype == "fp8":
        from ndcheck_kernels.models.caches.fp8 import keep_fp8

        try:
            keep_fp8(cache, model.dtype)
        except ValueError as error:
            raise UsageError(
                f"--kv-cache-dtype fp8: {type(model).__name__} has more than keys and values of "
                f"every token to keep ({error}): leave it out"
            ) from error
    return cache


class _FixedLengthCache(transformers.StaticCache):
    def get_seq_length(self, layer_idx: int = 0) -> Any:
        # The layer counts in place, and flex attention asks for this number after it has counted.
        length = super().get_seq_length(layer_idx)
        return length.clone() if isinstance(length, Tensor) else length


def _cache_argument(model: Any) -> str:
    from ndcheck_kernels.models.caches.argument import cache_argument

    try:
        return cache_argument(model.forward)
    except ValueError as error:
        raise UsageError(
            f"{type(model).__name__} {error}, so the state that it decodes from is out of control"
        ) from error


def _pad_left(states: Tensor, n_columns: int) -> Tensor:
    """[1, heads, tokens, head_dim] to [1, heads, n_columns, head_dim]."""
    return torch.nn.functional.pad(states, (0, 0, n_columns - states.shape[-2], 0))
