"""What attention and the gates of an 8B give, quantised where it arises: bits of two launches."""

from dataclasses import replace

import pytest
import torch

from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.products import block_fp8, fp8_configs
from ndcheck_kernels.cuda.rows.quantise import quantise_rows, silu_mul_quantise
from ndcheck_kernels.ops.block_fp8 import quantise_weight


def same(left, right):
    """Equal codes, and equal scales."""
    return torch.equal(left[0].view(torch.uint8), right[0].view(torch.uint8)) and torch.equal(
        left[1], right[1]
    )


@pytest.mark.parametrize("ahead", [1024, 512])
def test_gates_of_an_8b(monkeypatch, ahead):
    torch.manual_seed(0)
    (n, k), most = (24576, 4096), 128
    table = tuple((m, replace(c, ahead=ahead)) for m, c in fp8_configs.MEASURED[n, k])
    monkeypatch.setitem(fp8_configs.MEASURED, (n, k), table)
    monkeypatch.setattr(block_fp8, "MOST_GATED", most)
    weight = quantise_weight(torch.randn(n, k, device="cuda") * 0.02)
    rows = torch.randn(most, k, device="cuda").bfloat16() * 4
    rows[3] = 0
    for m in (1, 5, 16, 17, 32, 128):
        codes = quantise_rows(rows[:m])
        product = block_fp8.block_fp8_matmul(*codes, *weight)
        apart = silu_mul_quantise(*product.chunk(2, -1))
        other = silu_mul_quantise(*product.flip(-1).chunk(2, -1))
        assert not same(other, apart)
        for _ in range(5):
            assert same(block_fp8.gated_block_fp8_matmul(*codes, *weight), apart), m


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
