"""Sinks, ALiBi, windows, capped scores and other head dims: the same row in every presentation."""

from __future__ import annotations

import pytest
import torch
import transformers

from ndcheck_kernels import (
    UncoveredOpError,
    UnsupportedCallError,
    invariant_kernels,
    invariant_model,
)
from ndcheck_kernels.measure.reference import attention_reference
from ndcheck_kernels.models.attention import Spans
from ndcheck_kernels.ops.attention import as_causal, attention_op

HEADS, KV_HEADS, LENGTH = 4, 2, 200
DTYPES = [torch.float32, torch.bfloat16]
SINKS = torch.tensor([-1.0, 0.5, 3.0, 40.0])
SLOPES = torch.tensor([0.5, 0.25, 0.0625, 0.00390625])
KINDS = {
    "sinks": {"sinks": SINKS},
    "alibi": {"slopes": SLOPES},
    "rounded alibi": {"slopes": SLOPES, "bias_dtype": torch.bfloat16},
    "all": {"softcap": 5.0, "sinks": SINKS, "slopes": SLOPES},
}
# Of query and key, and of value.
HEAD_DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]


def make_row(dtype, width=64, value_width=64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, width), (KV_HEADS, width), (KV_HEADS, value_width)]
    rows = [torch.randn(1, h, LENGTH, d, generator=generator) * 2 for h, d in shapes]
    return [row.to(dtype) for row in rows]


def spans(start, first, last, window):
    """Of a row at column `start`, whose queries are tokens first..last - 1."""
    end = torch.arange(first, last) + 1
    begin = (end - window).clamp(min=0) if window else torch.zeros_like(end)
    origin = torch.full_like(end, start)
    return torch.stack([origin, begin + start, end + start], -1)[None].int()


def run(q, k, v, row_spans, **kind):
    with invariant_kernels():
        return attention_op(q, k, v, row_spans, q.shape[-1] ** -0.5, **kind)


def check(dtype, dims, window, kind):
    q, k, v = make_row(dtype, *dims)
    whole = run(q, k, v, spans(0, 0, LENGTH, window), **kind)
    scale = q.shape[-1] ** -0.5
    expected = attention_reference(q, k, v, spans(0, 0, LENGTH, window), scale, **kind)
    # A score of s has an error of s * eps(float32), which the exponential passes on.
    score = q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() * scale
    score += LENGTH * kind.get("slopes", SLOPES * 0).max()
    budget = torch.finfo(dtype).eps + score * torch.finfo(torch.float32).eps
    assert (whole.double() - expected).abs().max() <= budget * expected.abs().max()
    for first, last, left in [(0, 1, 0), (0, 130, 7), (130, 131, 0), (199, 200, 77), (60, 200, 1)]:
        padding = (0, 0, left, 19)
        keys, values = (torch.nn.functional.pad(t, padding, value=torch.nan) for t in (k, v))
        part = run(q[:, :, first:last], keys, values, spans(left, first, last, window), **kind)
        assert torch.equal(part, whole[:, :, first:last]), (first, last, left)
    # The same row second among others, in a batch.
    rows = [torch.cat([torch.full_like(t, torch.nan), t, t.flip(-2)]) for t in (q, k, v)]
    nothing = torch.zeros_like(spans(0, 0, LENGTH, window))
    batch = torch.cat([nothing, *[spans(0, 0, LENGTH, window)] * 2])
    assert torch.equal(run(*rows, batch, **kind)[1:2], whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind, window, dtype):
    check(dtype, (64, 64), window, KINDS[kind])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_head_dims(dims, dtype):
    check(dtype, dims, 0, {})


def test_a_sink_takes_weight_and_gives_no_value():
    q, k, v = make_row(torch.float32)
    v = torch.ones_like(v)
    out = run(q, k, v, spans(0, 0, LENGTH, 0), sinks=torch.tensor([-torch.inf, 0.0, 5.0, 500.0]))
    assert torch.allclose(out[:, 0], torch.ones(()))
    assert (out[:, 1] < 1).all()
    assert (out[:, 2] < out[:, 1].mean()).any()
    assert (out[:, 3] == 0).all()


def test_queries_that_see_nothing_give_zeros_beside_a_sink():
    q, k, v = make_row(torch.float32)
    assert (run(q, k, v, torch.zeros(1, LENGTH, 3).int(), sinks=SINKS) == 0).all()


def test_alibi_that_counts_padding_is_caught():
    """The planted fault: positions counted from the padded column 0, so rounded elsewhere."""
    q, k, v = make_row(torch.bfloat16)
    kind = KINDS["rounded alibi"]
    whole = run(q, k, v, spans(0, 0, LENGTH, 0), **kind)
    keys, values = (torch.nn.functional.pad(t, (0, 0, 77, 0)) for t in (k, v))
    faulty_spans = spans(77, 0, LENGTH, 0)
    faulty_spans[..., 0] = 0
    assert not torch.equal(run(q, keys, values, faulty_spans, **kind), whole)


def test_spans_as_start_end_and_window():
    # Rows with padding, with none, and of a sliding cache that dropped the first 30 tokens.
    rows = [spans(5, 0, 60, 40), spans(0, 5, 65, 40), spans(0, 30, 90, 40) - 30]
    rows[2][..., 1].clamp_(min=0)
    start, end, *kind = as_causal(torch.cat(rows))
    assert (start.tolist(), end.tolist(), kind) == ([5, 0, -30], [65, 65, 60], [40, False])
    whole = torch.cat([spans(5, 0, 20, 40), spans(0, 5, 25, 0)])
    assert as_causal(whole)[2] is None
    decode = torch.tensor([[[-30, 0, 40]], [[-3, 0, 40]]])
    assert as_causal(decode)[2] == 40
    padding = torch.tensor([[[2, 0, 0], [2, 0, 0], [2, 2, 3]]])
    assert [t.tolist() for t in as_causal(padding)[:2]] == [[2], [3]]


@pytest.mark.parametrize(
    ("first", "dropped"), [(0, 0), (17, 0), (48, 0), (59, 0), (48, 30), (59, 30)]
)
def test_spans_as_chunks(first, dropped):
    """Whatever length is read from them, it hides the same keys as chunks of 16 tokens do."""
    place = torch.arange(first, 60)
    rows = [
        torch.stack([torch.full_like(place, left), place // 16 * 16 + left, place + 1 + left], -1)
        for left in ([0, 7] if not dropped else [-dropped])
    ]
    start, _, window, chunked = as_causal(torch.stack(rows).int())
    assert start.tolist() == [int(row[0, 0]) for row in rows]
    begin = place // window * window if chunked else (place + 1 - window).clamp(min=0)
    assert torch.equal(begin, place // 16 * 16)


@pytest.mark.parametrize(
    "odd",
    [
        [[0, 0, 1], [0, 0, 3]],  # sees a later key
        [[0, 1, 3], [0, 1, 4]],  # windows of two sizes, or a chunk of 1 that has 2 keys
        [[0, 0, 3], [1, 1, 4]],  # two first tokens
    ],
)
def test_other_spans_are_refused(odd):
    with pytest.raises(UnsupportedCallError, match="causal"):
        as_causal(torch.tensor([odd]))


def test_a_model_that_calculates_with_its_mask_is_refused_by_name():
    """Doge fills its own scores in where the mask is not 0: it would take spans for a mask."""
    config = transformers.DogeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.DogeForCausalLM(config).eval()
    for length in (1, 2, 7):  # Of two keys, spans have the shape of a mask.
        ids = torch.arange(length)[None]
        with torch.no_grad(), invariant_model(model), invariant_kernels() as scope:
            with pytest.raises(UncoveredOpError, match=r"self_attn \(DogeAttention\).*its mask"):
                model(ids)
            assert scope.refused["attention"] == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m + 0,
        lambda m: torch.zeros(2, 1, 1, 2).masked_fill(m != 0, 1),
        lambda m: m.bool(),
        lambda m: m.to(torch.float32),
        lambda m: m[..., :1],
        lambda m: torch.where(torch.ones(2, dtype=torch.bool), m, 1),
        lambda m: torch.ones(2, 1, 1, 2) * m,
    ],
)
def test_spans_are_passed_on_or_refused(use):
    spans = torch.tensor([[0, 5], [2, 5]], dtype=torch.int32)[:, None, None].as_subclass(Spans)
    for move in (
        lambda m: m.to("cpu"), lambda m: m[1:], lambda m: m.expand(2, 1, 1, 2), lambda m: m.clone(),
    ):  # fmt: skip
        assert isinstance(move(spans), Spans)
    assert repr(spans)
    with pytest.raises(UncoveredOpError, match="calculates with its mask"):
        use(spans)
