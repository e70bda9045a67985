"""Prefill, chunks and decode of the shipped configuration, at the sizes of an 8B model."""

from dataclasses import replace

import pytest
import torch

from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.configs import DecodeTile, attention_config

LENGTH = 5500  # past the splits that grow longer


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def operands(request):
    def draw(heads):
        return torch.randn(2, heads, LENGTH, 128, device="cuda").to(request.param)

    return draw(32), draw(8), draw(8)


def test_prefill_agrees_with_decode_and_chunks(operands):
    q, k, v = operands
    whole = causal.attention(q, k, v)
    for end in (
        1,
        2,
        63,
        64,
        65,
        255,
        256,
        257,
        511,
        512,
        513,
        1025,
        4095,
        4096,
        4097,
        5121,
        LENGTH,
    ):
        for queries in (1, 2, 5, 16, 17, 100):
            first = max(0, end - queries)
            got = causal.attention(q[:, :, first:end], k[:, :, :end], v[:, :, :end])
            assert torch.equal(got, whole[:, :, first:end]), (first, end)


def test_a_cache_with_padding_and_unused_space_agrees(operands):
    q, k, v = operands
    whole = causal.attention(q, k, v)
    for start, unused in ((1, 0), (77, 13), (640, 1000)):
        wide_k, wide_v = (
            torch.nn.functional.pad(t, (0, 0, start, unused), value=float("nan")) for t in (k, v)
        )
        starts, lengths = (torch.full((2,), n, device="cuda") for n in (start, start + LENGTH))
        for queries in (1, LENGTH):
            got = causal.attention(
                q[:, :, -queries:], wide_k, wide_v, starts=starts, lengths=lengths
            )
            assert torch.equal(got, whole[:, :, -queries:]), (start, unused, queries)


@pytest.mark.parametrize("batch", [1, 2, 7, 65])
def test_decode_is_the_same_in_any_batch(operands, batch):
    q, k, v = (t[:1] for t in operands)
    alone = causal.attention(q[:, :, -1:], k, v)
    length = 7000
    others = torch.randn(batch, 8, length, 128, device="cuda").to(q.dtype)
    lengths = torch.randint(1, length, (batch,), device="cuda")
    queries = torch.randn(batch, 32, 1, 128, device="cuda").to(q.dtype)
    others[-1] = float("nan")
    for row in {0, batch // 2, batch - 1}:
        keys, values, mixed = others.clone(), others.clone(), queries.clone()
        keys[row, :, :LENGTH], values[row, :, :LENGTH], mixed[row] = k[0], v[0], q[0, :, -1:]
        ends = lengths.clone()
        ends[row] = LENGTH
        got = causal.attention(mixed, keys, values, lengths=ends)
        assert torch.equal(got[row], alone[0]), row


@pytest.mark.parametrize("batch", [2, 40])
def test_however_many_splits_a_program_takes_bits_are_the_same(operands, batch):
    q, k, v = (t[:1].expand(batch, -1, -1, -1) for t in operands)
    config = attention_config(128, 2, 90)
    want = causal.attention(q[:1], k[:1], v[:1])[:, :, -1:].expand(batch, -1, -1, -1)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    runs = set()
    for per_sm in (1, 2, 4, 16, 1000):
        for tile in (config.few, config.many, DecodeTile(4, 1), DecodeTile(8, 2)):
            tile = replace(tile, per_sm=per_sm)
            other = replace(config, few=tile, many=tile)
            runs.add(other.decode(4, other.splits(LENGTH), 8 * batch, sms)[1])
            for _ in range(3):  # whoever comes last
                got = causal._launch(
                    q[:, :, -1:], k, v, None, None, causal.Kind(), other, parallel=True
                )
                assert torch.equal(got, want), (per_sm, tile)
    assert len(runs) > 1


def test_both_tiles_of_queries_agree(operands):
    config = attention_config(128, 2, 90)
    short, long = (
        causal._launch(
            *operands, None, None, causal.Kind(), replace(config, short=tile), parallel=False
        )
        for tile in (config.short, config.long)
    )
    assert torch.equal(short, long)


def test_another_split_is_told_apart(operands):
    q, k, v = operands
    config = attention_config(128, 2, 90)
    other = replace(config, split=2 * config.split)
    right, wrong = (
        causal._launch(q[:, :, -1:], k, v, None, None, causal.Kind(), c, parallel=True)
        for c in (config, other)
    )
    assert not torch.equal(right, wrong)


@pytest.mark.parametrize("parallel", [False, True])
def test_accuracy(operands, parallel):
    q, k, v = (t[:1] for t in operands)
    queries = q[:, :, -16:]
    got = causal._launch(
        queries, k, v, None, None, causal.Kind(), attention_config(128, 2, 90), parallel=parallel
    )
    keys, values = (t.double().repeat_interleave(4, 1) for t in (k, v))
    scores = queries.double() @ keys.mT * 128**-0.5
    hidden = torch.ones(16, LENGTH, device="cuda", dtype=torch.bool).triu(LENGTH - 15)
    want = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values
    error = (got.double() - want).norm() / want.norm()
    assert error < 2 * torch.finfo(q.dtype).eps
