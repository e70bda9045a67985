"""Experts in MXFP4 on CPU: every code and scale as OCP Microscaling Formats 1.0 has them."""

from fractions import Fraction

import pytest
import torch

from ndcheck_kernels import UncoveredOpError, invariant_kernels
from ndcheck_kernels.ops import mxfp4

aten = torch.ops.aten


def value_of(code):
    """e2m1: a sign, two bits of exponent with bias 1, one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = Fraction(mantissa, 2) if exponent == 0 else (1 + Fraction(mantissa, 2)) * 2**exponent / 2
    return -size if code & 8 else size


def test_every_code_with_every_scale():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    blocks = (codes[::2] | codes[1::2] << 4).expand(255, 1, 16)
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    got = mxfp4.dequantise(blocks, scales, torch.float32)
    for scale in range(255):
        for place, code in enumerate(codes.tolist()):
            exact = value_of(code) * Fraction(2) ** (scale - 127)
            if abs(exact) <= Fraction(torch.finfo(torch.float32).max):
                assert Fraction(got[scale, place].item()) == exact
            else:
                assert got[scale, place].isinf()
            assert torch.signbit(got[scale, place]).item() == bool(code & 8)
    nan = mxfp4.dequantise(blocks[:1], torch.full((1, 1), 255, dtype=torch.uint8), torch.bfloat16)
    assert nan.isnan().all()


def test_drawn_weights_are_within_their_format():
    torch.manual_seed(0)
    weight = torch.randn(3, 20, 96) * torch.logspace(-6, 6, 96)
    blocks, scales = mxfp4.quantise(weight)
    error = (mxfp4.dequantise(blocks, scales, torch.float32) - weight).abs().unflatten(-1, (3, 32))
    largest = weight.abs().unflatten(-1, (3, 32)).amax(-1, keepdim=True)
    # Half of the widest step, from 4 to 6; and what is beyond 6 of a power that reaches 8.
    assert (error <= largest / 4).all()
    assert (error > largest / 16).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_have_the_bits_of_plain_weights(dtype):
    torch.manual_seed(0)
    blocks, scales = mxfp4.quantise(torch.randn(3, 48, 96))
    rows, ends = torch.randn(9, 96).to(dtype), torch.tensor([4, 4, 9], dtype=torch.int32)
    plain = mxfp4.dequantise(blocks, scales, dtype).transpose(1, 2).contiguous()
    with invariant_kernels() as scope:
        got = mxfp4.grouped_op(rows, blocks, scales, ends)
        alone = mxfp4.grouped_op(rows[:1], blocks, scales, torch.tensor([1, 1, 1]))
        expected = aten._grouped_mm.default(rows, plain, ends)
    assert scope.fires["mxfp4_grouped"] == 2
    assert torch.equal(got, expected)
    assert torch.equal(got[:1], alone)


def test_other_sizes_are_refused():
    blocks, scales = mxfp4.quantise(torch.randn(2, 8, 64))
    ends = torch.tensor([1, 2], dtype=torch.int32)
    for given in ((torch.ones(2, 32), blocks, scales), (torch.ones(2, 64), blocks, scales[:1])):
        with (
            pytest.raises(UncoveredOpError, match=r"rows of \d+ times blocks \(2, 8, 2, 16\)"),
            invariant_kernels(),
        ):
            mxfp4.grouped_op(*given, ends)
