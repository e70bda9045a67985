"""Attention over the packed sequences and the paged cache of transformers' continuous batching.

A step packs the new tokens of all requests into one row, [1, H, T, D], and reads their pages into
another, [1, H_kv, S, D], one request after the other. Here requests with equally many new tokens
become the batch of one call of attention, whose contract keeps the others out of a row's bits.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ndcheck_kernels.scope.refusal import UnsupportedCallError

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""query [B, H, Q, D], key and value [B, H_kv, KV, D], spans [B, 1, 2] -> [B, H, Q, D]."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict[str, Any],
    attend: Attend,
) -> torch.Tensor:
    """Attend to each request's own keys and values: [1, H, T, D].

    ``kwargs`` are those of transformers' `PagedAttentionArgs`. Raises UnsupportedCallError for a
    sliding window, whose pages do not hold a request from its first token on.
    """
    if kwargs.get("sliding_window") or getattr(module, "sliding_window", None):
        raise UnsupportedCallError("it has no sliding window over a paged cache")
    if kwargs.get("block_table") is not None:
        raise UnsupportedCallError("it reads the cache by index, not by block table")
    key, value = _update(module, key, value, kwargs)
    ends_q, ends_k = kwargs["cu_seq_lens_q"], _of_full_attention(kwargs["cu_seq_lens_k"])
    longest_q, longest_k = (
        # transformers 5.10 calls it max_seqlen.
        int(_of_full_attention(kwargs.get(f"max_length_{x}", kwargs.get(f"max_seqlen_{x}"))))
        for x in "qk"
    )
    out = torch.empty_like(query)
    lengths_k = ends_k.diff()
    for length, rows in _by_length(ends_q, longest_q):
        columns_q = ends_q[:-1][rows, None] + torch.arange(length, device=query.device)
        columns_k = ends_k[:-1][rows, None] + torch.arange(longest_k, device=query.device)
        columns_k = columns_k.clamp(max=key.shape[2] - 1)  # Beyond a request's own: hidden.
        own = lengths_k[rows].int()
        spans = torch.stack([torch.zeros_like(own), own], -1)[:, None]
        keys, values = _unpack(key, columns_k), _unpack(value, columns_k)
        result = attend(_unpack(query, columns_q), keys, values, spans)
        out[0, :, columns_q] = result.transpose(0, 1)
    return out


def _by_length(ends: torch.Tensor, longest: int) -> list[tuple[int, torch.Tensor | slice]]:
    """(new tokens, which requests) for every number of new tokens that a request has."""
    if longest == 1:
        return [(1, slice(None))]  # Read nothing back: most steps only decode.
    lengths = ends.diff().tolist()
    return [
        (n, torch.tensor([i for i, m in enumerate(lengths) if m == n], device=ends.device))
        for n in sorted(set(lengths))
    ]


def _unpack(packed: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[1, H, T, D], [B, L] -> [B, H, L, D]."""
    return packed[0, :, columns].transpose(0, 1).contiguous()


def _update(
    module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache's keys and values of every request in turn, new ones written: [1, H_kv, S, D]."""
    if "cache" not in kwargs:  # Since transformers 5.24 the module has written them itself.
        return key, value
    update = kwargs["cache"].update
    if "kwargs" in inspect.signature(update).parameters:
        key, value = update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
        )
        return key, value
    key, value = update(  # Before transformers 5.18.
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None]


def _of_full_attention(by_layer_type: Any) -> Any:
    return by_layer_type["full_attention"] if isinstance(by_layer_type, dict) else by_layer_type
