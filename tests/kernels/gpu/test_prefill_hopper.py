"""The prefill kernel for Hopper gives the very bits of the one that any GPU runs."""

from dataclasses import replace

import pytest
import torch

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.configs import attention_config

hopper = pytest.importorskip("ndcheck_kernels.cuda.attention.prefill_hopper")
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
        own = hopper.prefill
        patch.setattr(hopper, "prefill", lambda *args: calls.append(own(*args)))
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
def test_bits(dtype, dim, dim_v, heads, kv_heads, length):
    q = draw(2, heads, length, dim, dtype=dtype)
    k, v = (
        draw(2, kv_heads, length, dim, dtype=dtype),
        draw(2, kv_heads, length, dim_v, dtype=dtype),
    )
    new, old = both(q, k, v)
    assert equal(new, old)
    assert new.isfinite().all()


@pytest.mark.parametrize("queries", [100, 129, 700])
def test_padding_unused_cache_and_sinks(queries):
    dtype, width = torch.bfloat16, 1500
    q = draw(4, 32, queries, 128, dtype=dtype)
    k, v = (draw(4, 8, width, 128, dtype=dtype) for _ in range(2))
    starts = torch.tensor([0, 3, 640, width - 60], device=DEVICE)
    lengths = torch.tensor([width, 777, 1343, width - 1], device=DEVICE)
    for row, (start, end) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        for t in (k, v):
            t[row, :, :start] = t[row, :, end:] = float("nan")
    sinks = torch.randn(32, device=DEVICE).to(dtype)
    for options in ({}, {"sinks": sinks}):
        new, old = both(q, k, v, starts=starts, lengths=lengths, **options)
        assert equal(new, old)
        assert new.isfinite().all()


def test_views_of_a_longer_cache():
    q = draw(2, 400, 32, 128, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (draw(2, 8, 2048, 128, dtype=torch.bfloat16)[:, :, :1024] for _ in range(2))
    assert equal(*both(q, k, v))


def test_replays_of_a_graph_repeat_their_bits():
    q = draw(4, 32, 2048, 128, dtype=torch.bfloat16)
    k, v = (draw(4, 8, 2048, 128, dtype=torch.bfloat16) for _ in range(2))
    want = causal.attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = causal.attention(q, k, v)
    for _ in range(50):
        got.fill_(float("nan"))
        graph.replay()
        assert equal(got, want)


def test_another_split_is_told_apart():
    q = draw(1, 8, 1024, 128, dtype=torch.bfloat16)
    k, v = (draw(1, 8, 1024, 128, dtype=torch.bfloat16) for _ in range(2))
    config = attention_config(128, 2, 90)
    other = replace(config, split=2 * config.split)
    right, wrong = (
        causal._launch(q, k, v, None, None, causal.Kind(), c, parallel=False)
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
