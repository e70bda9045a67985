"""The decode kernel for Hopper gives the very bits of the one that any GPU runs."""

from dataclasses import replace

import pytest
import torch

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.configs import attention_config

hopper = pytest.importorskip("ndcheck_kernels.cuda.attention.decode_hopper")
DEVICE = torch.device("cuda", 0)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not device.has_hopper_kernels(DEVICE),
    reason="needs compute capability 9.0 and Triton 3.6",
)


def draw(*shape, dtype):
    """Wide range and cancellation, so that another order of addition shows."""
    exponent = torch.randint(-3, 3, shape, device=DEVICE)
    return (torch.randn(shape, device=DEVICE) * 2.0**exponent).to(dtype)


def both(q, k, v, **options):
    """By the Hopper kernel, which must have run, and by the other."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        own = hopper.decode
        patch.setattr(hopper, "decode", lambda *args: calls.append(own(*args)))
        new = causal.attention(q, k, v, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "has_hopper_kernels", lambda _: False)
        old = causal.attention(q, k, v, **options)
    assert len(calls) == 1
    return new, old


def equal(a, b):
    bits = torch.int16
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(32, 8, 1), (32, 8, 4), (6, 6, 5)])
@pytest.mark.parametrize(("batch", "length"), [(70, 257), (70, 1000), (16, 512), (4, 5500)])
def test_bits(dtype, dim, heads, kv_heads, queries, batch, length):
    q = draw(batch, heads, queries, dim, dtype=dtype)
    k, v = (draw(batch, kv_heads, length, dim, dtype=dtype) for _ in range(2))
    new, old = both(q, k, v)
    assert equal(new, old)
    assert new.isfinite().all()


@pytest.mark.parametrize("runs", [1, 2, 3, 5, 7, 18, 64])
def test_no_cut_into_runs_changes_bits(runs, monkeypatch):
    monkeypatch.setattr(hopper, "_runs_per_row", lambda *_: runs)
    q = draw(5, 32, 2, 128, dtype=torch.bfloat16)
    k, v = (draw(5, 8, 5500, 128, dtype=torch.bfloat16) for _ in range(2))
    # Of 18 splits, of one, of a few tokens, of none.
    starts = torch.tensor([0, 17, 5300, 4000, 900], device=DEVICE)
    lengths = torch.tensor([5500, 2700, 5500, 4003, 900], device=DEVICE)
    assert equal(*both(q, k, v, starts=starts, lengths=lengths))


@pytest.mark.parametrize("queries", [1, 3])
def test_padding_unused_cache_and_sinks(queries):
    dtype, width = torch.bfloat16, 1500
    q = draw(24, 32, queries, 128, dtype=dtype)
    k, v = (draw(24, 8, width, 128, dtype=dtype) for _ in range(2))
    # A row without tokens, rows of one block and of many, and bounds that no block ends at.
    starts = torch.tensor([0, 3, 640, width - 60, 7, 1000] * 4, device=DEVICE)
    lengths = torch.tensor([width, 777, 1343, width - 1, 135, 1000] * 4, device=DEVICE)
    for row, (start, end) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        for t in (k, v):
            t[row, :, :start] = t[row, :, end:] = float("nan")
    sinks = torch.randn(32, device=DEVICE).to(dtype)
    for options in ({}, {"sinks": sinks}):
        new, old = both(q, k, v, starts=starts, lengths=lengths, **options)
        assert equal(new, old)
        assert new.isfinite().all()


def test_a_row_has_the_same_bits_in_any_batch():
    q = draw(130, 32, 1, 128, dtype=torch.bfloat16)
    k, v = (draw(130, 8, 3000, 128, dtype=torch.bfloat16) for _ in range(2))
    whole = causal.attention(q, k, v)
    for rows in (1, 5, 40):
        assert equal(causal.attention(q[:rows], k[:rows], v[:rows]), whole[:rows])


def test_views_of_a_longer_cache():
    q = draw(40, 1, 32, 128, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (draw(40, 8, 2048, 128, dtype=torch.bfloat16)[:, :, :1024] for _ in range(2))
    assert equal(*both(q, k, v))


def test_replays_of_a_graph_repeat_their_bits():
    q = draw(64, 32, 1, 128, dtype=torch.bfloat16)
    k, v = (draw(64, 8, 2048, 128, dtype=torch.bfloat16) for _ in range(2))
    want = causal.attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = causal.attention(q, k, v)
    for _ in range(50):
        got.fill_(float("nan"))
        graph.replay()
        assert equal(got, want)


def test_another_split_is_told_apart():
    q = draw(40, 32, 1, 128, dtype=torch.bfloat16)
    k, v = (draw(40, 8, 1024, 128, dtype=torch.bfloat16) for _ in range(2))
    config = attention_config(128, 2, 90)
    other = replace(config, split=2 * config.split)
    right, wrong = (
        causal._launch(q, k, v, None, None, causal.Kind(), c, parallel=True)
        for c in (config, other)
    )
    assert not equal(right, wrong)
