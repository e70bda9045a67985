"""The attention kernels for Hopper give the very bits of those that any GPU runs."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.configs import attention_config

DEVICE = torch.device("cuda", 0)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not device.has_hopper_kernels(DEVICE),
    reason="needs compute capability 9.0 and Triton 3.6",
)


def draw(*shape, dtype):
    """Wide range and cancellation, so that another order of addition shows."""
    exponent = torch.randint(-3, 3, shape, device=DEVICE)
    return (torch.randn(shape, device=DEVICE) * 2.0**exponent).to(dtype)


def kernel_module(name):
    return import_module(f"ndcheck_kernels.cuda.attention.{name}_hopper")


def both(name, q, k, v, **options):
    """By the Hopper kernel, `prefill` or `decode`, which must have run, and by the other."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        own = getattr(kernel_module(name), name)
        patch.setattr(kernel_module(name), name, lambda *args: calls.append(own(*args)))
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
@pytest.mark.parametrize(("dim", "dim_v"), [(128, 128), (64, 64), (64, 128)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (6, 6), (8, 1)])
@pytest.mark.parametrize("length", [65, 127, 128, 129, 1000, 5500])
def test_bits_of_prefill(dtype, dim, dim_v, heads, kv_heads, length):
    q = draw(2, heads, length, dim, dtype=dtype)
    k, v = (
        draw(2, kv_heads, length, dim, dtype=dtype),
        draw(2, kv_heads, length, dim_v, dtype=dtype),
    )
    new, old = both("prefill", q, k, v)
    assert equal(new, old)
    assert new.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(32, 8, 1), (32, 8, 4), (6, 6, 5)])
@pytest.mark.parametrize(("batch", "length"), [(70, 257), (70, 1000), (16, 512), (4, 5500)])
def test_bits_of_decode(dtype, dim, heads, kv_heads, queries, batch, length):
    q = draw(batch, heads, queries, dim, dtype=dtype)
    k, v = (draw(batch, kv_heads, length, dim, dtype=dtype) for _ in range(2))
    new, old = both("decode", q, k, v)
    assert equal(new, old)
    assert new.isfinite().all()


@pytest.mark.parametrize("runs", [1, 2, 3, 5, 7, 18, 64])
def test_no_cut_of_decode_into_runs_changes_bits(runs, monkeypatch):
    monkeypatch.setattr(kernel_module("decode"), "_runs_per_row", lambda *_: runs)
    q = draw(5, 32, 2, 128, dtype=torch.bfloat16)
    k, v = (draw(5, 8, 5500, 128, dtype=torch.bfloat16) for _ in range(2))
    # Of 18 splits, of one, of a few tokens, of none.
    starts = torch.tensor([0, 17, 5300, 4000, 900], device=DEVICE)
    lengths = torch.tensor([5500, 2700, 5500, 4003, 900], device=DEVICE)
    assert equal(*both("decode", q, k, v, starts=starts, lengths=lengths))


# Bounds that no block ends at; of decode a row without tokens, too, and rows of one block.
BOUNDS = [(0, 1500), (3, 777), (640, 1343), (1440, 1499)]
MORE_BOUNDS = [*BOUNDS, (7, 135), (1000, 1000)] * 4


@pytest.mark.parametrize(
    ("name", "queries", "bounds"),
    [
        *(("prefill", queries, BOUNDS) for queries in (100, 129, 700)),
        *(("decode", queries, MORE_BOUNDS) for queries in (1, 3)),
    ],
)
def test_padding_unused_cache_and_sinks(name, queries, bounds):
    dtype, rows = torch.bfloat16, len(bounds)
    q = draw(rows, 32, queries, 128, dtype=dtype)
    k, v = (draw(rows, 8, 1500, 128, dtype=dtype) for _ in range(2))
    starts, lengths = (torch.tensor(side, device=DEVICE) for side in zip(*bounds, strict=True))
    for row, (start, end) in enumerate(bounds):
        for t in (k, v):
            t[row, :, :start] = t[row, :, end:] = float("nan")
    sinks = torch.randn(32, device=DEVICE).to(dtype)
    for options in ({}, {"sinks": sinks}):
        new, old = both(name, q, k, v, starts=starts, lengths=lengths, **options)
        assert equal(new, old)
        assert new.isfinite().all()


def test_a_row_has_the_same_bits_in_any_batch():
    q = draw(130, 32, 1, 128, dtype=torch.bfloat16)
    k, v = (draw(130, 8, 3000, 128, dtype=torch.bfloat16) for _ in range(2))
    whole = causal.attention(q, k, v)
    for rows in (1, 5, 40):
        assert equal(causal.attention(q[:rows], k[:rows], v[:rows]), whole[:rows])


@pytest.mark.parametrize(("name", "batch", "queries"), [("prefill", 2, 400), ("decode", 40, 1)])
def test_views_of_a_longer_cache(name, batch, queries):
    q = draw(batch, queries, 32, 128, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (draw(batch, 8, 2048, 128, dtype=torch.bfloat16)[:, :, :1024] for _ in range(2))
    assert equal(*both(name, q, k, v))


@pytest.mark.parametrize(("batch", "queries"), [(4, 2048), (64, 1)], ids=["prefill", "decode"])
def test_replays_of_a_graph_repeat_their_bits(batch, queries):
    q = draw(batch, 32, queries, 128, dtype=torch.bfloat16)
    k, v = (draw(batch, 8, 2048, 128, dtype=torch.bfloat16) for _ in range(2))
    want = causal.attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = causal.attention(q, k, v)
    for _ in range(50):
        got.fill_(float("nan"))
        graph.replay()
        assert equal(got, want)


@pytest.mark.parametrize(
    ("batch", "heads", "queries"), [(1, 8, 1024), (40, 32, 1)], ids=["prefill", "decode"]
)
def test_another_split_is_told_apart(batch, heads, queries):
    q = draw(batch, heads, queries, 128, dtype=torch.bfloat16)
    k, v = (draw(batch, 8, 1024, 128, dtype=torch.bfloat16) for _ in range(2))
    config = attention_config(128, 2, 90)
    other = replace(config, split=2 * config.split)
    right, wrong = (
        causal._launch(q, k, v, None, None, causal.Kind(), c, parallel=queries == 1)
        for c in (config, other)
    )
    assert not equal(right, wrong)


def test_what_the_copy_engine_cannot_read_is_left_to_the_other():
    k = draw(1, 8, 128, 128, dtype=torch.bfloat16)
    odd = draw(1, 8, 128, 132, dtype=torch.bfloat16)[..., :128]
    assert causal.can_copy(k, k, k)
    assert not causal.can_copy(odd, k, k)
    assert not causal.can_copy(k.float(), k.float(), k.float())
    assert not causal.can_copy(k[..., :96], k[..., :96], k)
