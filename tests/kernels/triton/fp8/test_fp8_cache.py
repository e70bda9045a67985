"""Attention over an FP8 cache on CUDA, or in the interpreter, has the bits of the widened one."""

import pytest
import torch

from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.attention.qkv import qkv
from ndcheck_kernels.cuda.configs import AttentionConfig, DecodeTile, PrefillTile
from ndcheck_kernels.models.caches.fp8 import as_codes

TILE, DECODE = PrefillTile(32, 4, 1), DecodeTile(4, 1)
SMALL = AttentionConfig(
    32, 32, TILE, TILE, DECODE, DECODE, 16, short_splits=2
)  # many in a short context


def bits(t):
    return t.contiguous().view(torch.uint8)


@pytest.fixture
def operands(dtype, device):
    """Two rows over a cache of 150: one full, one padded on the left and unused at the end."""
    q = torch.randn(2, 4, 4, 32, device=device).to(dtype)
    k, v = (as_codes(torch.randn(2, 2, 150, 32, device=device)) for _ in range(2))
    limits = [torch.tensor(t, device=device) for t in ([0, 81], [150, 140])]
    return q, k, v, *limits


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("parallel", [False, True])
def test_codes_are_read_as_the_numbers_that_they_are(operands, parallel, window, dtype):
    q, k, v, *limits = operands
    kind = causal.Kind(window=window)
    got = causal._launch(q, k, v, *limits, kind, SMALL, parallel=parallel)
    wide = causal._launch(q, k.to(dtype), v.to(dtype), *limits, kind, SMALL, parallel=parallel)
    assert torch.equal(bits(got), bits(wide))
    other = k.clone()
    other.view(torch.uint8)[:, :, 120] ^= 0x80  # A sign.
    changed = causal._launch(q, other, v, *limits, kind, SMALL, parallel=parallel)
    assert not torch.equal(bits(changed), bits(got))


def test_many_queries_have_the_bits_of_few(operands):
    """Prefill and decode over codes: on Hopper by other kernels than over the model's dtype."""
    q, k, v, *limits = operands
    whole = causal._launch(q, k, v, *limits, causal.Kind(), SMALL, parallel=False)
    last = causal._launch(q[:, :, -1:], k, v, *limits, causal.Kind(), SMALL, parallel=True)
    assert torch.equal(bits(whole[:, :, -1:]), bits(last))


def test_the_shipped_configuration_has_one_order(dtype, device):
    q = torch.randn(1, 4, 70, 64, device=device).to(dtype)
    k, v = (as_codes(torch.randn(1, 2, 70, 64, device=device)) for _ in range(2))
    whole = causal.attention(q, k, v)
    last = causal.attention(q[:, :, -1:], k, v)
    assert torch.equal(bits(whole[:, :, -1:]), bits(last))
    assert torch.equal(bits(whole), bits(causal.attention(q, k.to(dtype), v.to(dtype))))


def test_one_narrow_operand_is_refused(operands, dtype):
    q, k, v, *_ = operands
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        causal.attention(q, k, v.to(dtype))


def test_the_fused_write_stores_what_the_cache_would(dtype, device):
    x = torch.randn(2, 3, (4 + 2 * 2) * 32, device=device).to(dtype)
    x[0, 0] *= 1000 if dtype != torch.float16 else 300
    cos, sin = (torch.randn(1, 3, 32, device=device).to(dtype) for _ in range(2))
    offset = torch.tensor(1, device=device)
    wide = [torch.zeros(2, 2, 5, 32, dtype=dtype, device=device) for _ in range(2)]
    narrow = [t.to(torch.float8_e4m3fn) for t in wide]
    weight = torch.rand(32, dtype=dtype, device=device) + 0.5
    for weights in ({}, {"q_weight": weight, "k_weight": weight}):
        q = qkv(x, cos, sin, *wide, offset, **weights)
        assert torch.equal(bits(qkv(x, cos, sin, *narrow, offset, **weights)), bits(q))
        for codes, numbers in zip(narrow, wide, strict=True):
            assert torch.equal(bits(codes), bits(as_codes(numbers)))
        assert wide[1].abs().max() > 448
