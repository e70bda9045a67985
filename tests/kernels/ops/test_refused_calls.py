"""A call that torch refuses gives no numbers within the kernels either; torch says which it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ndcheck_kernels import UncoveredOpError, invariant_kernels

X = torch.arange(12.0).view(3, 4)
HEADS = torch.ones(1, 4, 3, 8)

REFUSED = {
    "mm with one row": lambda: X @ torch.ones(1, 4),
    "mm with no row": lambda: X @ torch.ones(0, 4),
    "linear of one feature": lambda: F.linear(X, torch.ones(5, 1)),
    "linear of one feature with bias": lambda: F.linear(X, torch.ones(5, 1), torch.ones(5)),
    "mv": lambda: torch.mv(X, torch.ones(1)),
    "dot": lambda: torch.dot(torch.ones(4), torch.ones(0)),
    "bmm of one row": lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 1, 4)),
    "bmm of one item": lambda: torch.bmm(torch.ones(2, 3, 1), torch.ones(1, 1, 4)),
    "bmm of no item": lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(0, 4, 5)),
    "addmm of two dtypes": lambda: torch.addmm(X, torch.ones(3, 2), torch.ones(2, 4).double()),
    "addmm with a larger bias": lambda: torch.addmm(
        torch.ones(2, 3, 4), torch.ones(3, 2), torch.ones(2, 4)
    ),
    "linear with a bias of another dtype": lambda: F.linear(
        X.bfloat16(), torch.ones(5, 4).bfloat16(), torch.ones(5)
    ),
    "linear with an integer bias": lambda: F.linear(X[None], torch.ones(5, 4), torch.arange(5)),
    "linear of a vector with a bias": lambda: F.linear(X, torch.ones(4), torch.ones(1)),
    "addmm with a bias of another dtype": lambda: torch.addmm(
        torch.ones(3, 2).double(), X, torch.ones(4, 2)
    ),
    "addmm with a complex factor": lambda: torch.addmm(
        torch.ones(2), X, torch.ones(4, 2), alpha=1j
    ),
    "baddbmm with an integer bias": lambda: torch.baddbmm(
        torch.ones(1).int(), X[None], torch.ones(1, 4, 2)
    ),
    "baddbmm with a complex factor": lambda: torch.baddbmm(
        torch.ones(1), X[None], torch.ones(1, 4, 2), beta=1j
    ),
    "matmul of a number": lambda: X @ torch.tensor(2.0),
    "mm of a vector": lambda: torch.mm(torch.ones(0), torch.ones(0, 5)),
    "polar coordinates of two dtypes": lambda: torch.polar(X, X.double()),
    "an angle that is a boolean": lambda: torch.polar(X, X > 1),
    "baddbmm of two dtypes": lambda: torch.baddbmm(
        torch.ones(1), X[None].half(), torch.ones(1, 4, 2)
    ),
    "addmm_ into a row": lambda: torch.ones(1, 4).addmm_(torch.ones(3, 2), torch.ones(2, 4)),
    "sum of no such dim": lambda: X.sum(5),
    "sum of no such negative dim": lambda: X.sum(-3),
    "sum of a dim twice": lambda: X.sum((0, 0)),
    "mean of no such dim": lambda: X.mean(2),
    "var of no such dim": lambda: X.var(4),
    "norm of a dim twice": lambda: torch.linalg.vector_norm(X, dim=(1, -1)),
    "norm in a narrower dtype": lambda: torch.linalg.vector_norm(X, dtype=torch.float16),
    "norm of integers": lambda: torch.linalg.vector_norm(X.long(), dtype=torch.float32),
    "logsumexp of no such dim": lambda: X.logsumexp(4),
    "softmax of no such dim": lambda: torch.tensor(3.0).softmax(5),
    "softmax of complex numbers": lambda: X.to(torch.complex64).softmax(0),
    "layer_norm of complex numbers": lambda: F.layer_norm(X.to(torch.complex64), [4]),
    "layer_norm of other dims": lambda: F.layer_norm(X, [2]),
    "layer_norm with an integer bias": lambda: F.layer_norm(X, [4], X[0], X[0].long()),
    "layer_norm with a wider weight": lambda: F.layer_norm(X, [4], X[0].double()),
    "layer_norm with parameters of two dtypes": lambda: F.layer_norm(
        X.bfloat16(), [4], X[0], X[0].bfloat16()
    ),
    "layer_norm in float64 with a float32 weight": lambda: F.layer_norm(X.double(), [4], X[0]),
    "exp into another device": lambda: torch.exp(X, out=torch.empty(3, 4, device="meta")),
    "mm into another device": lambda: torch.mm(X, X.t(), out=torch.empty(3, 3, device="meta")),
    "index_add of a narrower dtype": lambda: X.index_add(0, torch.tensor([0]), X[:1].half()),
    "attention with a mask of another dtype": lambda: F.scaled_dot_product_attention(
        HEADS, HEADS, HEADS, torch.zeros(3, 3).half()
    ),
    "attention with a mask of one dim": lambda: F.scaled_dot_product_attention(
        HEADS, HEADS, HEADS, torch.zeros(3) == 0
    ),
    "layer_norm with one weight": lambda: F.layer_norm(X, [4], torch.ones(1)),
    "rms_norm of other dims": lambda: F.rms_norm(X, [6]),
    "rms_norm with a weight a row": lambda: F.rms_norm(X, [4], torch.ones(3, 4)),
    "index_add of one column": lambda: X.index_add(0, torch.tensor([0, 1]), torch.ones(2, 1)),
    "attention of fewer key heads": lambda: F.scaled_dot_product_attention(
        HEADS, HEADS[:, :2], HEADS[:, :2]
    ),
    "attention of three heads and two": lambda: F.scaled_dot_product_attention(
        HEADS[:, :3], HEADS[:, :2], HEADS[:, :2]
    ),
    "attention of two dtypes": lambda: F.scaled_dot_product_attention(
        HEADS, HEADS.bfloat16(), HEADS
    ),
    "attention with an integer mask": lambda: F.scaled_dot_product_attention(
        HEADS, HEADS, HEADS, torch.ones(3, 3).long()
    ),
    "attention of other widths": lambda: F.scaled_dot_product_attention(
        HEADS, HEADS[..., :1], HEADS
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_gives_no_numbers(name):
    with pytest.raises((RuntimeError, IndexError)):
        REFUSED[name]()
    with pytest.raises((RuntimeError, IndexError, UncoveredOpError)), invariant_kernels():
        REFUSED[name]()


COMPLEX = torch.complex(X, X.flip(0))


@pytest.mark.parametrize(
    "product",
    [
        lambda: torch.addmm(COMPLEX[:, :2], COMPLEX, COMPLEX.t()[:, :2]),
        lambda: torch.addmm(COMPLEX[0, :3], COMPLEX, COMPLEX.t(), alpha=2),
        lambda: torch.baddbmm(COMPLEX[:1, None, :3], COMPLEX[None], COMPLEX.t()[None]),
        lambda: COMPLEX[:, :1] @ COMPLEX[:1],
    ],
)
def test_complex_products_are_refused_and_not_those_of_the_real_parts(product):
    assert bool(product().imag.any())
    with (
        pytest.raises(UncoveredOpError, match="no product of torch"),
        invariant_kernels(),
    ):
        product()


SAME = {
    "layer_norm in 16 bits with a float32 weight": lambda: F.layer_norm(
        X.half(), [4], X[1]
    ).float(),
    "rsqrt of integers": lambda: torch.tensor([4, 16]).rsqrt(),
    "a square of integers as floats": lambda: torch.arange(4) ** 2.0,
    "a square of integers": lambda: torch.arange(4) ** 2,
    "norm of one large number": lambda: torch.linalg.vector_norm(torch.full((2, 1), 3e38), dim=-1),
    "norm of one small number": lambda: torch.full((2, 1), 1e-40).norm(dim=-1),
    "layer_norm of nothing": lambda: F.layer_norm(torch.ones(3, 0), [0]),
    "rms_norm of nothing": lambda: F.rms_norm(torch.ones(3, 0), [0]),
    "running sums in integers": lambda: torch.full((4,), 2.0**24 + 2).cumsum(0, dtype=torch.int64),
    "no queries": lambda: F.scaled_dot_product_attention(HEADS[:, :, :0], HEADS, HEADS),
    "no keys": lambda: F.scaled_dot_product_attention(HEADS, HEADS[:, :, :0], HEADS[:, :, :0]),
}


@pytest.mark.parametrize("name", SAME)
def test_what_torch_gives_at_the_ends(name):
    with invariant_kernels():
        found = SAME[name]()
    torch.testing.assert_close(found, SAME[name](), rtol=0, atol=0)


def test_a_mask_of_three_dims_is_one_of_heads():
    """It broadcasts from the right as in torch, whatever the number of rows."""
    torch.manual_seed(0)
    heads = torch.randn(2, 2, 3, 8)
    masks = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    masks[1, :, 1:] = False
    with pytest.raises(UncoveredOpError, match="every head has a mask"), invariant_kernels():
        F.scaled_dot_product_attention(heads, heads, heads, masks)
    with invariant_kernels():
        found = F.scaled_dot_product_attention(heads, heads, heads, masks[1:])
    expected = F.scaled_dot_product_attention(heads, heads, heads, masks[1:])
    torch.testing.assert_close(found, expected)


def test_a_mask_beside_is_causal_is_not_left_out():
    mask = torch.tensor([[True, False, True]]).expand(3, 3)
    with pytest.raises(UncoveredOpError, match="is_causal beside a mask"), invariant_kernels():
        F.scaled_dot_product_attention(HEADS, HEADS, HEADS, mask, is_causal=True)
