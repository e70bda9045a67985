"""What launches of an 8B's FP8 layer quantise where it arises has the bits of two launches."""

import pytest
import torch

from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.rows.quantise import (
    OneScale,
    quantise_rows,
    rms_norm_quantise,
    silu_mul_quantise,
)
from ndcheck_kernels.cuda.rows.rms_norm import rms_norm
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul
from ndcheck_kernels.ops import row_fp8


def same(left, right):
    """Equal codes, and equal scales."""
    return torch.equal(left[0].view(torch.uint8), right[0].view(torch.uint8)) and torch.equal(
        left[1], right[1]
    )


@pytest.mark.parametrize("columns", [176, 3000])
@pytest.mark.parametrize("rows", [1, 8, 128])
def test_attention_of_an_8b(rows, columns):
    torch.manual_seed(0)
    q = torch.randn(rows, 32, 1, 128, device="cuda").bfloat16()
    k, v = (torch.randn(rows, 8, columns, 128, device="cuda").bfloat16() for _ in range(2))
    lengths = torch.randint(1, columns + 1, (rows,), device="cuda")
    starts = (torch.rand(rows, device="cuda") * lengths).long()
    limits = {"starts": starts, "lengths": lengths, "scale": 128**-0.5}
    out = causal.attention(q, k, v, **limits)
    apart = quantise_rows(out.transpose(1, 2).reshape(rows, -1))
    assert same(causal.quantised_attention(q, k, v, **limits), apart)
    assert not same(causal.quantised_attention(q, k, v * 1.01, **limits), apart)


@pytest.mark.parametrize("one_scale", [None, OneScale(), OneScale(bound=2.0)], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_norm_and_gate_of_an_8b(rows, one_scale):
    torch.manual_seed(0)
    # Integers, whose squares every order adds exactly.
    x = torch.randint(-4, 5, (rows, 4096), device="cuda").bfloat16()
    weight = torch.rand(4096, device="cuda")
    gate, up = (torch.randn(rows, 24576, device="cuda").bfloat16() * 4).chunk(2, 1)
    for fused, apart in (
        (rms_norm_quantise(x, weight, 1e-6, one_scale=one_scale), rms_norm(x, weight, 1e-6)),
        (silu_mul_quantise(gate, up, one_scale=one_scale), silu_mul(gate, up)),
    ):
        assert same(fused, quantise_rows(apart, one_scale=one_scale))
        assert not same(fused, quantise_rows(apart * 1.01, one_scale=one_scale))
        if one_scale is not None:
            expected = row_fp8.quantise_rows(apart.cpu(), None, one_scale.bound)
            assert same([each.cpu() for each in fused], expected)
