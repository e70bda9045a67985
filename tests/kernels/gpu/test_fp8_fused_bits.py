"""What attention of an 8B gives, quantised where it arises: the bits of two launches."""

import pytest
import torch

from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.rows.quantise import quantise_rows


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
