"""Operands that are no plain tensors: what subclasses call is judged, other layouts are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ndcheck_kernels import UncoveredOpError, invariant_kernels


class Wrapped(torch.Tensor):
    """A subclass as those of torchao, DTensor and jagged tensors: it calls ops on what it holds."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda each: each.held, (args, kwargs or {}))
        return func(*args, **kwargs)


class Packed(Wrapped):
    """8-bit codes [N, K], which it multiplies by a kernel that nothing covers."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.t.default:
            return args[0]
        codes = args[1].held
        return torch._weight_int8pack_mm(args[0], codes, torch.ones(len(codes)).bfloat16())


def test_a_kernel_of_a_subclass_is_not_taken_for_ours():
    """The product that it was given was counted as one of ours."""
    weight = Packed(torch.ones(64, 64, dtype=torch.int8))
    uncovered = pytest.raises(UncoveredOpError, match=r"aten\._weight_int8pack_mm")
    with invariant_kernels() as scope, uncovered:
        F.linear(torch.ones(2, 64).bfloat16(), weight)
    assert not scope.fires


def test_what_a_subclass_calls_is_judged():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4096), torch.randn(64, 4096)
    stock = F.linear(x, weight)
    with invariant_kernels() as scope:
        plain = F.linear(x, weight)
        assert not torch.equal(plain, stock), "this machine's GEMM cannot tell"
        assert torch.equal(F.linear(x, Wrapped(weight)), plain)
        assert torch.equal(F.linear(Wrapped(x), weight), plain)
        with pytest.raises(UncoveredOpError, match=r"aten\.convolution"):
            F.conv1d(Wrapped(torch.ones(1, 1, 4)), torch.ones(1, 1, 2))
    assert scope.fires == {"linear": 3}


def test_tensors_without_numbers_stay_torchs():
    with invariant_kernels() as scope, FakeTensorMode():
        assert F.linear(torch.empty(5, 64), torch.empty(32, 64)).shape == (5, 32)
    assert not scope.fires


NESTED = [torch.ones(2, 8), torch.ones(3, 8)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (lambda: torch.ones(3, 8).to_sparse(), "torch.sparse_coo"),
        (lambda: torch.ones(3, 8).to_sparse_csr(), "torch.sparse_csr"),
        (lambda: torch.ones(3, 8).to_mkldnn(), "torch._mkldnn"),
        (lambda: torch.nested.nested_tensor(NESTED), "nested"),
    ],
)
def test_a_layout_that_no_kernel_takes_is_refused(make, layout):
    x = make()
    with (
        invariant_kernels(),
        pytest.raises(UncoveredOpError, match=f"aten.linear.*the layout of a tensor is {layout}"),
    ):
        F.linear(x, torch.ones(4, 8))
