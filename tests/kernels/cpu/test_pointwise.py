"""Pointwise ops on CPU: an element's bits depend on its value, not on where it stands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ndcheck_kernels import UncoveredOpError, invariant_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

UNARY = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "mish": F.mish,
    "elu": F.elu,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": lambda x: torch.log(x.abs()),
    "cos": torch.cos,
    "sin": torch.sin,
    "erf": torch.erf,
    "rsqrt": lambda x: torch.rsqrt(x.abs()),
    "square": lambda x: x.pow(2),
    "cube": lambda x: x.pow(3.0),
    "power": lambda x: torch.pow(x.abs(), 1.7),
    "base": lambda x: torch.pow(3.0, x.clamp(-4, 4)),
    "add, alpha": lambda x: torch.add(x, x * x, alpha=1.7),
    "add, alpha by place": lambda x: torch.ops.aten.add.Scalar(x, 1.1, 0.3),
    "rsub, alpha": lambda x: torch.rsub(x, 1.1, alpha=0.3),
    "cut quotient": lambda x: torch.div(x * x + 1, x, rounding_mode="trunc"),
    "floor_divide": lambda x: (x * x + 1) // x,
    "maximum of zeros": lambda x: torch.maximum(x, -x),
    "minimum of zeros": lambda x: torch.minimum(x, -x),
    "clamp by a tensor": lambda x: x.clamp(min=-x),
    "clamp_ by a tensor": lambda x: x.clone().clamp_max_(-x),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=1.3),
    "lerp": lambda x: torch.lerp(x, x * x, 0.3),
    "sigmoid_": lambda x: x.clone().sigmoid_(),
    "exp, out=": lambda x: torch.exp(x, out=torch.empty_like(x)),
    "gumbel": lambda x: -torch.log(-torch.log(x.sigmoid())),
    "swiglu": lambda x: F.silu(x) * (x + 1),
    # These pass to torch, as IEEE fixes their results.
    "add": lambda x: x + 0.3,
    "mul": lambda x: x * 1.7,
    "div": lambda x: x / 1.7,
    "reciprocal": torch.reciprocal,
    "sqrt": lambda x: x.abs().sqrt(),
    "clamp": lambda x: x.clamp(-1, 0.7),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "float": lambda x: x.float() + 1,
    "half": lambda x: (x.float() * 1.1).bfloat16(),
}


def finite_values(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a 16-bit dtype; for float32, 2**16 of its bit patterns."""
    if dtype == torch.float32:
        patterns = torch.arange(-(2**31), 2**31, 2**16 + 1)[: 2**16].to(torch.int32)
    else:
        patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = patterns.view(dtype)
    return values[values.isfinite()]


def places(op, values):
    """The values' results at the end of a short piece, strided, and in a large tensor, and which
    values these are.
    """
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(len(values))
    order = torch.randperm(len(values), generator=generator)
    yield "another order", op(values[order]), order
    short = every[: 37 * 300].view(-1, 37)[::25]
    yield "rows of 37", torch.cat([op(row) for row in values[short]]), short.flatten()
    yield "single", torch.stack([op(v) for v in values[::997]]), every[::997]
    strided = torch.empty(len(values), 3, dtype=values.dtype)[:, 1].copy_(values)
    yield "strided", op(strided), every
    yield "unaligned", op(torch.cat([values[:1], values])[1:]), every
    odd = torch.cat([every, every, every])[:-13]
    yield "large", op(values[odd]), odd


def violations(op, values):
    together = bits(op(values))
    return [
        name
        for name, result, which in places(op, values)
        if not torch.equal(bits(result), together[which])
    ]


def bits(result):
    """As integers, in which 0 is not -0; every NaN is one."""
    width = {2: torch.int16, 4: torch.int32}[result.element_size()]
    return result.nan_to_num(7.0, torch.inf, -torch.inf).contiguous().view(width)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UNARY)
def test_the_place_of_an_element_changes_no_bit(name, dtype):
    with invariant_kernels():
        assert violations(UNARY[name], finite_values(dtype)) == []


@pytest.mark.parametrize("name", ["silu", "sigmoid", "softplus", "gelu, tanh", "exp2"])
def test_stock_fails_the_same_check(name):
    assert violations(UNARY[name], finite_values(torch.float32)) != []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UNARY)
def test_pointwise_ops_are_as_accurate_as_stock(name, dtype):
    x = torch.linspace(-4, 4, 999).to(dtype)
    reference = UNARY[name](x.double())
    stock = (UNARY[name](x).double() - reference).abs()
    with invariant_kernels():
        ours = (UNARY[name](x).double() - reference).abs()
    budget = 1.5 * stock.nan_to_num(0.0).max() + torch.finfo(dtype).eps
    assert bool((ours.nan_to_num(0.0) <= budget).all())


def test_broadcasting_and_promotion_follow_torch():
    x, y = torch.rand(3, 1, 5), torch.rand(4, 1)
    half, wide_scalar = torch.rand(7).bfloat16(), torch.tensor(1.5)
    expected = (
        torch.pow(x, y),
        torch.pow(half, wide_scalar),
        torch.pow(torch.tensor(2.0), wide_scalar),
    )
    with invariant_kernels():
        results = (
            torch.pow(x, y),
            torch.pow(half, wide_scalar),
            torch.pow(torch.tensor(2.0), wide_scalar),
        )
    for result, stock in zip(results, expected, strict=True):
        assert result.dtype == stock.dtype
        assert result.shape == stock.shape
        torch.testing.assert_close(result, stock)


def test_empty_tensors_and_integers_work():
    with invariant_kernels():
        assert F.silu(torch.empty(0, 4)).shape == (0, 4)
        assert torch.exp(torch.tensor([0, 1])).dtype == torch.float32
        assert torch.equal(torch.tensor([3, 4]) ** 2, torch.tensor([9, 16]))


def test_several_results_are_refused():
    with invariant_kernels(), pytest.raises(UncoveredOpError, match="several results"):
        torch.frexp(torch.ones(3))
