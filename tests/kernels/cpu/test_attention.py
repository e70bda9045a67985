"""Attention on CPU: a query's bits depend on its row's own tokens, however they are presented."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ndcheck_kernels import UncoveredOpError, invariant_kernels
from ndcheck_kernels.cpu import attention
from ndcheck_kernels.measure.reference import attention_reference
from ndcheck_kernels.ops.attention import attention_op, spans_from_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS, KV_HEADS, WIDTH, LENGTH = 4, 2, 32, 300
SCALE = WIDTH**-0.5


@pytest.fixture
def sequence():
    """`make(dtype)`: query, key and value of one row of LENGTH tokens."""

    def make(dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(1, h, LENGTH, WIDTH) for h in (HEADS, KV_HEADS, KV_HEADS)]
        return [(torch.randn(s, generator=generator) * 2).to(dtype) for s in shapes]

    return make


def causal(start, end):
    return torch.tensor([[[start, end]]], dtype=torch.int32)


def window_spans(queries, first_position, window):
    """Of a row without padding, whose query i stands at `first_position + i`."""
    end = first_position + torch.arange(queries) + 1
    begin = (end - window).clamp(min=0)
    return torch.stack([torch.zeros_like(end), begin, end], -1)[None].int()


def run(q, k, v, spans, softcap=0.0):
    with invariant_kernels():
        return attention_op(q, k, v, spans, SCALE, softcap)


def padded(tensor, left, right, fill=torch.nan):
    """A row placed in a longer cache whose other columns hold rubbish."""
    shape = [*tensor.shape[:2], left + tensor.shape[2] + right, tensor.shape[3]]
    out = torch.full(shape, fill, dtype=tensor.dtype)
    out[:, :, left : left + tensor.shape[2]] = tensor
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_attention_is_as_accurate_as_stock(dtype, softcap, sequence):
    q, k, v = sequence(dtype)
    expected = attention_reference(q, k, v, causal(0, LENGTH), SCALE, softcap)
    error = (run(q, k, v, causal(0, LENGTH), softcap).double() - expected).abs().max()
    # A score of s has an error of s * eps, which the exponential passes on.
    budget = torch.finfo(dtype).eps * expected.abs().max() * (8 if dtype == torch.float32 else 1)
    if not softcap:
        stock = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        budget = torch.maximum(budget, 1.5 * (stock.double() - expected).abs().max())
    assert error <= budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_any_slice(dtype, sequence):
    q, k, v = sequence(dtype)
    whole = run(q, k, v, causal(0, LENGTH))
    for first, last in [(0, 1), (0, 50), (50, 178), (127, 129), (128, 300), (255, 256), (299, 300)]:
        part = run(q[:, :, first:last], k[:, :, :last], v[:, :, :last], causal(0, last))
        assert torch.equal(part, whole[:, :, first:last]), (first, last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("left", [0, 1, 77, 128, 131])
@pytest.mark.parametrize("right", [0, 1, 200])
def test_padding_and_rubbish_around_a_row_change_nothing(dtype, left, right, sequence):
    q, k, v = sequence(dtype)
    whole = run(q, k, v, causal(0, LENGTH))
    cache = padded(k, left, right), padded(v, left, right, torch.inf)
    assert torch.equal(run(q, *cache, causal(left, left + LENGTH)), whole)
    last = run(q[:, :, -1:], *cache, causal(left, left + LENGTH))
    assert torch.equal(last, whole[:, :, -1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [2, 3, 8, 17])
def test_neighbours_and_slots_change_nothing(dtype, batch, sequence):
    q, k, v = sequence(dtype)
    whole = run(q, k, v, causal(0, LENGTH))
    for slot in {0, batch // 2, batch - 1}:
        for queries in (1, 40):
            rows_q = torch.full((batch, HEADS, queries, WIDTH), torch.nan, dtype=dtype)
            rows_k = torch.full((batch, KV_HEADS, 450, WIDTH), torch.inf, dtype=dtype)
            rows_v = rows_k.clone()
            left = [(37 * i) % 150 for i in range(batch)]
            spans = torch.tensor([[[start, 450]] for start in left], dtype=torch.int32)
            start = 450 - LENGTH
            spans[slot, 0, 0] = start
            rows_q[slot] = q[0, :, -queries:]
            rows_k[slot, :, start:], rows_v[slot, :, start:] = k[0], v[0]
            result = run(rows_q, rows_k, rows_v, spans)[slot]
            assert torch.equal(result, whole[0, :, -queries:]), (slot, queries)


def test_a_window_is_the_same_in_any_slice_and_in_a_sliding_cache(sequence):
    q, k, v = sequence(torch.float32)
    whole = run(q, k, v, window_spans(LENGTH, 0, 90))
    part = run(q[:, :, 200:210], k[:, :, :210], v[:, :, :210], window_spans(10, 200, 90))
    assert torch.equal(part, whole[:, :, 200:210])
    # A sliding cache has dropped the first 100 tokens: column 0 is token 100.
    spans = window_spans(10, 200, 90) - 100
    part = run(q[:, :, 200:210], k[:, :, 100:210], v[:, :, 100:210], spans)
    assert torch.equal(part, whole[:, :, 200:210])
    expected = attention_reference(q, k, v, window_spans(LENGTH, 0, 90), SCALE)
    assert (whole.double() - expected).abs().max() < 1e-5


def test_turns_of_queries_change_no_bit(sequence, monkeypatch):
    q, k, v = sequence(torch.float32)
    whole = run(q, k, v, causal(0, LENGTH))
    monkeypatch.setattr(attention, "_SCORES", 30_000)
    assert torch.equal(run(q, k, v, causal(0, LENGTH)), whole)


def test_queries_that_see_nothing_give_zeros(sequence):
    q, k, v = sequence(torch.float32)
    out = run(q, k, v, causal(100, LENGTH))
    assert torch.equal(out[:, :, :100], torch.zeros_like(out[:, :, :100]))
    assert out[:, :, 100:].isfinite().all()
    nothing = run(q, k, v, causal(LENGTH, LENGTH))
    assert torch.equal(nothing, torch.zeros_like(nothing))
    assert run(q[:0], k[:0], v[:0], torch.zeros(0, 1, 2).int()).shape == (0, *q.shape[1:])


def test_splits_that_follow_the_padding_are_caught(sequence):
    """The planted fault: splits counted from column 0, not from the row's own first token."""
    q, k, v = sequence(torch.float32)
    whole = run(q, k, v, causal(0, LENGTH))
    spans = torch.stack([torch.zeros(LENGTH), torch.full((LENGTH,), 77), 78 + torch.arange(LENGTH)])
    faulty = run(q, padded(k, 77, 0), padded(v, 77, 0), spans.t()[None].int())
    assert not torch.equal(faulty, whole)
    assert torch.allclose(faulty, whole, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stock_fails_the_same_check(dtype, sequence):
    q, k, v = sequence(dtype)

    def stock(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    whole = stock(q, k, v, torch.ones(LENGTH, LENGTH).tril().bool())
    decode = [
        stock(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], None) for i in range(200, 300)
    ]
    assert not torch.equal(torch.cat(decode, 2), whole[:, :, 200:])


def test_scaled_dot_product_attention_runs_the_same_arithmetic(sequence):
    q, k, v = sequence(torch.bfloat16)
    whole = run(q, k, v, causal(0, LENGTH))
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    mask = torch.ones(LENGTH, LENGTH).tril().bool()
    with invariant_kernels() as scope:
        results = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True),
            F.scaled_dot_product_attention(q, k, v, mask),
            F.scaled_dot_product_attention(q, k, v, torch.where(mask, 0.0, -torch.inf).bfloat16()),
        ]
        last = F.scaled_dot_product_attention(q[:, :, -1:], k, v)
    assert all(torch.equal(result, whole) for result in results)
    assert torch.equal(last, whole[:, :, -1:])
    assert scope.missing(["attention"]) == ()


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.tensor([[True, False, True]]), "gaps"),
        (torch.tensor([[True, True, False], [False, True, True]]), "sliding window"),
        (torch.tensor([[0.0, 0.5, 0.0]]), "bias"),
        (torch.ones(1, 2, 1, 3).bool(), "mask of its own"),
    ],
)
def test_masks_without_a_first_token_are_refused(mask, reason):
    q, k = torch.rand(1, 2, mask.shape[-2], 8), torch.rand(1, 2, 3, 8)
    with invariant_kernels() as scope, pytest.raises(UncoveredOpError, match=reason):
        F.scaled_dot_product_attention(q, k, k, mask)
    assert scope.refused.total() == 1


def test_dropout_is_refused():
    q = torch.rand(1, 1, 2, 8)
    with invariant_kernels(), pytest.raises(UncoveredOpError, match="dropout"):
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)


def test_spans_of_a_left_padded_causal_mask():
    mask = torch.tensor([[[0, 0, 0], [0, 1, 0], [0, 1, 1]]]).bool()
    assert spans_from_mask(mask).tolist() == [[[1, 0, 0], [1, 1, 2], [1, 1, 3]]]


def test_the_op_fails_outside_a_scope(sequence):
    q, k, v = sequence(torch.float32)
    with pytest.raises(RuntimeError, match="only runs inside"):
        attention_op(q, k, v, causal(0, LENGTH), SCALE)
