"""Unrounded parts of longer sums: one bit class in fp32, where no rounding hides an order."""

import pytest
import torch

from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.ops.products import partial_grouped_op, partial_linear_op

# N, K of row-parallel layers of an 8B and a 235B on 1 to 8 ranks.
SHAPES = [(4096, 512), (4096, 1536), (4096, 2048), (4096, 4096), (4096, 12288)]
ROWS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 128, 129, 256, 257, 300, 512, 513, 1025, 2049)


def cancelling(m, n, k):
    a, b = (torch.randn(rows, k // 2, device="cuda").bfloat16() for rows in (m, n))
    order = torch.randperm(k, device="cuda")
    return torch.cat([a, a], 1)[:, order], torch.cat([b, -b], 1)[:, order]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_row_has_its_bits_among_any_others(n, k):
    x, w = cancelling(max(ROWS), n, k)
    with invariant_kernels():
        want = torch.cat([partial_linear_op(row, w) for row in x[:64].split(1)])
        for m in ROWS:
            got = partial_linear_op(x[:m], w)
            assert got.dtype == torch.float32
            assert torch.equal(got[:64], want[:m]), m
            assert torch.equal(partial_linear_op(x[:m].flip(0), w)[-1], want[0]), m
        halves = [partial_linear_op(x[:64, h], w[:, h]) for h in (slice(k // 2), slice(k // 2, k))]
    assert not torch.equal(halves[0] + halves[1], want)


@pytest.mark.parametrize("k", [192, 384, 1536])
def test_rows_in_groups_have_the_bits_of_rows_alone(k):
    e, n = 16, 4096
    x, w = cancelling(512, n, k)
    weights = torch.stack([w.roll(i, 0) for i in range(e)])
    with invariant_kernels():
        for counts in (torch.full((e,), 32), torch.tensor([480, *[1] * 8, *[0] * 6, 24])):
            ends = counts.cumsum(0).int().cuda()
            out = partial_grouped_op(x, weights.transpose(1, 2), ends)
            rows = zip(x.split(counts.tolist()), weights, strict=True)
            want = torch.cat([partial_linear_op(part, weight) for part, weight in rows])
            assert torch.equal(out, want)
