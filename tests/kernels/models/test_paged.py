"""Packed requests get the bits of each alone, whatever stands beside them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ndcheck_kernels import UnsupportedCallError, invariant_kernels
from ndcheck_kernels.models.attention import register_attention
from ndcheck_kernels.models.caches.paged import paged_attention
from ndcheck_kernels.ops.attention import attention_op
from ndcheck_kernels.ops.library import NAME

HEADS, KV_HEADS, WIDTH = 4, 2, 16
LENGTHS = [(1, 300), (7, 7), (1, 129), (3, 40), (7, 131), (1, 1)]
"""(new tokens, keys) of each request."""


class Cache:
    """Gives back keys and values as a cache that already holds them."""

    def __init__(self, key, value):
        self.key, self.value = key, value

    def update(self, key_states, value_states, layer_idx, kwargs):
        return self.key, self.value


class OldCache(Cache):
    def update(self, key_states, value_states, layer_idx, read_index, write_index):
        return self.key[0].transpose(0, 1), self.value[0].transpose(0, 1)


def attend(query, key, value, spans):
    return attention_op(query, key, value, spans, WIDTH**-0.5)


def make(lengths, dtype, cache=Cache):
    generator = torch.Generator().manual_seed(0)
    n_queries, n_keys = (sum(column) for column in zip(*lengths, strict=True))
    query, key, value = (
        torch.randn(1, h, n, WIDTH, generator=generator).to(dtype)
        for h, n in ((HEADS, n_queries), (KV_HEADS, n_keys), (KV_HEADS, n_keys))
    )
    ends = torch.tensor([(0, 0), *lengths]).cumsum(0).int()
    kwargs = {
        "cache": cache and cache(key, value),
        "cu_seq_lens_q": ends[:, 0],
        "cu_seq_lens_k": {"full_attention": ends[:, 1]},
        "max_length_q": max(q for q, _ in lengths),
        "max_length_k": {"full_attention": max(k for _, k in lengths)},
        "read_index": [],
        "write_index": [],
    }
    if cache is None:
        del kwargs["cache"]
    return query, key, value, kwargs


def run(query, kwargs, key=None, value=None):
    """The new keys and values are in the cache already, so any will do; without a cache, all."""
    module = SimpleNamespace(layer_idx=0)
    key, value = (query, query) if "cache" in kwargs else (key, value)
    with invariant_kernels():
        return paged_attention(module, query, key, value, kwargs, attend)


@pytest.mark.parametrize("cache", [None, Cache, OldCache])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [LENGTHS, [pair for pair in LENGTHS if pair[0] == 1]])
def test_each_request_has_the_bits_it_has_alone(cache, dtype, lengths):
    query, key, value, kwargs = make(lengths, dtype, cache)
    packed = run(query, kwargs, key, value)
    at_q = at_k = 0
    for n_queries, n_keys in lengths:
        own_q, own_k = slice(at_q, at_q + n_queries), slice(at_k, at_k + n_keys)
        spans = torch.tensor([[[0, n_keys]]], dtype=torch.int32)
        with invariant_kernels():
            alone = attend(query[:, :, own_q], key[:, :, own_k], value[:, :, own_k], spans)
        assert torch.equal(packed[:, :, own_q], alone)
        at_q, at_k = own_q.stop, own_k.stop


def test_sinks_reach_every_request():
    from transformers import AttentionInterface

    register_attention()
    query, key, value, kwargs = make(LENGTHS, torch.float32)
    sinks = torch.tensor([4.0, 2.0, 0.0, -2.0])
    module = SimpleNamespace(layer_idx=0)
    with invariant_kernels():
        packed, _ = AttentionInterface()[NAME](
            module, query, query, query, None, s_aux=sinks, **kwargs
        )
        at_q = at_k = 0
        for n_queries, n_keys in LENGTHS:
            own_q, own_k = slice(at_q, at_q + n_queries), slice(at_k, at_k + n_keys)
            spans = torch.tensor([[[0, n_keys]]], dtype=torch.int32)
            operands = query[:, :, own_q], key[:, :, own_k], value[:, :, own_k], spans
            alone = attention_op(*operands, WIDTH**-0.5, sinks=sinks).transpose(1, 2)
            assert torch.equal(packed[:, own_q], alone)
            assert not torch.equal(alone, attend(*operands).transpose(1, 2))
            at_q, at_k = own_q.stop, own_k.stop


def test_a_neighbour_full_of_nan_touches_nobody():
    query, key, value, kwargs = make(LENGTHS, torch.bfloat16)
    clean = run(query, kwargs)
    key[:, :, 300:307] = torch.nan
    value[:, :, 300:307] = torch.nan
    poisoned = run(query, kwargs)
    assert poisoned[:, :, 1:8].isnan().all()
    others = [0, *range(8, query.shape[2])]
    assert torch.equal(clean[:, :, others], poisoned[:, :, others])


@pytest.mark.parametrize("extra", [{"sliding_window": 16}, {"block_table": torch.zeros(1)}])
def test_what_it_does_not_cover_is_refused(extra):
    query, _, _, kwargs = make(LENGTHS, torch.float32)
    with pytest.raises(UnsupportedCallError):
        run(query, {**kwargs, **extra})
