"""Parts of a sum over ranks: unrounded, of one order whatever the rows, on CPU."""

import pytest
import torch

from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.ops.products import partial_grouped_op, partial_linear_op

N, K = 48, 96
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def cancelling(rows, dtype):
    """Rows and weights whose exact product is zero: what is left is the order."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(m, K // 2, generator=generator).to(dtype) for m in (rows, N))
    order = torch.randperm(K, generator=generator)
    return torch.cat([a, a], 1)[:, order], torch.cat([b, -b], 1)[:, order]


def multiply(rows, weight):
    with invariant_kernels() as scope:
        out = partial_linear_op(rows, weight)
    assert scope.fires["partial_linear"] == 1
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_is_not_rounded_to_its_operands(dtype):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(m, K, generator=generator).to(dtype) for m in (5, N))
    out = multiply(x, w)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == wide
    exact = x.double() @ w.double().t()
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-5)
    if wide != dtype:
        assert not torch.equal(out, out.to(dtype).to(wide))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_row_has_its_bits_among_any_others(dtype):
    x, w = cancelling(64, dtype)
    alone = multiply(x[:1], w)
    assert alone.any()
    for m in (2, 3, 17, 64):
        assert torch.equal(multiply(x[:m], w)[:1], alone), m
        assert torch.equal(multiply(x[:m].flip(0), w)[-1:], alone), m
    half = multiply(x[:1, : K // 2].contiguous(), w[:, : K // 2].contiguous())
    rest = multiply(x[:1, K // 2 :].contiguous(), w[:, K // 2 :].contiguous())
    assert not torch.equal(half + rest, alone)  # Another grouping is told apart.


def test_rows_in_groups_have_the_bits_of_rows_alone():
    x, w = cancelling(12, torch.bfloat16)
    weights = torch.stack([w, w.flip(0), -w])
    ends = torch.tensor([5, 5, 12], dtype=torch.int32)
    with invariant_kernels():
        out = partial_grouped_op(x, weights.transpose(1, 2), ends)
    assert out.dtype == torch.float32
    assert torch.equal(out[:5], multiply(x[:5], w))
    assert torch.equal(out[5:], multiply(x[5:], -w))


def test_outside_a_scope_it_refuses():
    with pytest.raises(RuntimeError, match="only runs inside"):
        partial_linear_op(torch.ones(1, 2), torch.ones(3, 2))
