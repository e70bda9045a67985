"""Attention that leaves codes has the bits of attention and a launch that quantises its rows."""

import pytest
import torch

from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.rows.quantise import quantise_rows


def bits(t):
    return t.contiguous().view(torch.uint8)


@pytest.fixture
def operands(dtype, device):
    """Three rows over a cache: one full, one padded on the left, one not full."""

    def draw(length, columns, dim=128):
        q = torch.randn(3, 4, length, dim).to(dtype).to(device)
        k, v = (torch.randn(3, 2, columns, dim).to(dtype).to(device) for _ in range(2))
        starts = torch.tensor([0, columns // 2, 0], device=device)
        lengths = torch.tensor([columns, columns, columns - 5], device=device)
        return q, k, v, starts, lengths

    return draw


@pytest.mark.parametrize(
    ("length", "columns", "dim"),
    # In one split, in several that are merged, of many queries, and of heads that are half a block.
    [(1, 100, 128), (3, 100, 128), (1, 700, 128), (40, 60, 128), (1, 60, 64)],
)
def test_codes_are_those_of_the_rows(length, columns, dim, operands):
    q, k, v, starts, lengths = operands(length, columns, dim)
    limits = {"starts": starts, "lengths": lengths, "scale": dim**-0.5}
    codes, scales = causal.quantised_attention(q, k, v, **limits)
    out = causal.attention(q, k, v, **limits)
    expected = quantise_rows(out.transpose(1, 2).reshape(3 * length, -1))
    assert torch.equal(bits(codes), bits(expected[0]))
    assert torch.equal(scales, expected[1])
    assert scales.stride() == expected[1].stride()
    other = causal.quantised_attention(q, k, v * 1.01, **limits)
    assert not torch.equal(other[1], scales)


def test_a_row_has_its_codes_in_any_company(operands):
    q, k, v, starts, lengths = operands(1, 300)
    together = causal.quantised_attention(q, k, v, starts=starts, lengths=lengths, scale=0.1)
    for i in range(3):
        own = slice(i, i + 1)
        alone = causal.quantised_attention(
            q[own], k[own], v[own], starts=starts[own], lengths=lengths[own], scale=0.1
        )
        assert torch.equal(bits(alone[0]), bits(together[0][own]))
        assert torch.equal(alone[1], together[1][own])
