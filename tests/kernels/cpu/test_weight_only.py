"""Products with packed weights on CPU, against exact fractions, float64 and plain weights."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ndcheck_kernels import UncoveredOpError, invariant_kernels
from ndcheck_kernels.ops import weight_only as ops
from ndcheck_kernels.ops.weight_only import Packed, dequantise, pack, quantise

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def product(rows, packed, bias=None):
    with invariant_kernels():
        return ops.linear_op(
            rows, packed.codes, packed.scales, packed.zeros, packed.group_of, packed.bits, bias
        )


def is_nearest(value, exact):
    """Whether no neighbour of a number is nearer to a fraction than the number itself."""
    own = abs(Fraction(value.item()) - exact)
    ends = (torch.tensor(end, dtype=value.dtype) for end in (-torch.inf, torch.inf))
    beside = (torch.nextafter(value, end).item() for end in ends)
    return all(own <= abs(Fraction(x) - exact) for x in beside if abs(x) != torch.inf)


@given(
    st.integers(0, 255), st.integers(0, 256), st.sampled_from([4, 8]),
    st.integers(0, 0x7F7F), st.sampled_from(DTYPES),
)  # fmt: skip
@settings(deadline=None)
def test_weights_are_the_nearest_numbers(code, zero, bits, scale, dtype):
    """Scales of every exponent that bf16 has, 0, the denormal and the largest among them."""
    code, zero = code % (1 << bits), min(zero, 1 << bits)
    scales = torch.tensor([[scale]], dtype=torch.int16).view(torch.bfloat16)
    packed = Packed(
        pack(torch.tensor([[code]]), bits), scales, torch.tensor([[zero]], dtype=torch.int16),
        None, bits, 1,
    )  # fmt: skip
    packed.check()
    exact = (code - zero) * Fraction(scales.item())
    got = dequantise(packed, dtype)[0, 0]
    if abs(exact) > Fraction(torch.finfo(dtype).max):
        assert got.abs().item() >= torch.finfo(dtype).max
    else:
        assert is_nearest(got, exact)


@given(st.data(), st.sampled_from([4, 8]))
@settings(deadline=None)
def test_codes_are_unpacked_as_they_were(data, bits):
    n, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 600))
    codes = torch.randint(0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(k))
    packed = Packed(pack(codes, bits), torch.ones(1, n), None, None, bits, k)
    packed.check()
    assert torch.equal(ops.unpack(packed), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_lane_has_its_columns_in_its_words(bits):
    """Operand A of m64k16 in PTX: lane q of four holds columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9."""
    columns = 2 * 256 // bits
    for k in range(columns):
        codes = torch.zeros(1, columns, dtype=torch.uint8)
        codes[0, k] = 5
        words = pack(codes, bits).view(torch.int32)[0].tolist()
        (place,) = (i for i, word in enumerate(words) if word)
        run, lane, half = place // 8, place // 2 % 4, place % 2
        step, within = divmod(k, 16)
        assert lane == within % 8 // 2
        assert (run, half) == divmod(step // (8 // bits), 2)
        nth = within // 8 if bits == 8 else 2 * (step % 2) + within // 8
        assert words[place] == 5 << bits * nth + 16 * (k % 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "k", "group"), [(4, 384, 128), (4, 96, 32), (8, 300, 300)])
def test_products_have_the_bits_of_plain_weights(bits, k, group, dtype):
    torch.manual_seed(0)
    packed = quantise(torch.randn(48, k), bits, group, is_symmetric=False)
    rows, bias = torch.randn(2, 7, k).to(dtype), torch.randn(48).to(dtype)
    weight = dequantise(packed, dtype)
    with invariant_kernels() as scope:
        expected = F.linear(rows, weight), F.linear(rows, weight, bias)
    assert torch.equal(product(rows, packed), expected[0])
    assert torch.equal(product(rows, packed, bias), expected[1])
    assert scope.fires == {"linear": 2}
    exact = rows.double() @ weight.double().t()
    size = rows.double().abs() @ weight.double().abs().t()
    budget = torch.finfo(dtype).eps * exact.abs() + 2.0**-20 * size
    assert ((expected[0].double() - exact).abs() <= budget).all()
    assert ((1.03 * expected[0].double() - exact).abs() > budget).any()


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(("bits", "steps"), [(4, 7), (8, 127)])
def test_quantised_weights_are_within_half_a_step(bits, steps, is_symmetric):
    torch.manual_seed(0)
    weight = torch.randn(20, 256) * torch.logspace(-3, 3, 20)[:, None]
    packed = quantise(weight, bits, 64, is_symmetric=is_symmetric)
    largest = weight.view(20, 4, 64).abs().amax(-1).repeat_interleave(64, 1)
    error = (dequantise(packed, torch.float32) - weight).abs()
    # Asymmetric, a clamped zero shifts the ends of the range by another half.
    assert (error <= largest / steps * (0.5001 if is_symmetric else 1.0001)).all()
    assert (error > largest / steps * 0.4).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_its_bits_in_any_company(dtype):
    torch.manual_seed(0)
    packed = quantise(torch.randn(160, 384), 4, 128, is_symmetric=True)
    rows = torch.randn(40, 384).to(dtype)
    alone = product(rows[:1], packed)
    for m in (2, 3, 16, 17, 40):
        for position in (0, m // 2, m - 1):
            batch = rows.roll(7, 0)[:m].clone()
            batch[0], batch[m - 1] = torch.nan, torch.inf
            batch[position] = rows[0]
            assert torch.equal(product(batch, packed)[position], alone[0])


def test_columns_may_belong_to_any_group():
    torch.manual_seed(0)
    packed = quantise(torch.randn(24, 96), 4, 32, is_symmetric=False)
    order = (torch.arange(96) // 32)[torch.randperm(96)].to(torch.int32)
    mixed = Packed(packed.codes, packed.scales, packed.zeros, order, 4, 96)
    expected = torch.empty(24, 96)
    for column, group in enumerate(order.tolist()):
        code = ops.unpack(packed)[:, column].float() - packed.zeros[group]
        expected[:, column] = code * packed.scales[group]
    assert torch.equal(dequantise(mixed, torch.float32), expected)
    rows = torch.randn(3, 96)
    with invariant_kernels():
        assert torch.equal(product(rows, mixed), F.linear(rows, expected))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"codes": torch.zeros(64, 128)}, "codes of 4 bits in torch.float32"),
        ({"codes": torch.zeros(64, 64, dtype=torch.uint8)}, r"for 256 columns"),
        ({"scales": torch.ones(3, 64)}, r"scales \(3, 64\)"),
        ({"scales": torch.ones(2, 64).double()}, "scales are torch.float64"),
        ({"zeros": torch.ones(2, 64)}, r"zeros \(2, 64\) of torch.float32"),
        ({"group_of": torch.zeros(9, dtype=torch.int32)}, r"groups of \(9,\) columns"),
        ({"bits": 3}, "codes of 3 bits"),
    ],
)
def test_what_is_not_in_the_contract_is_refused(change, reason):
    packed = quantise(torch.randn(64, 256), 4, 128, is_symmetric=True)
    said = {"codes": packed.codes, "scales": packed.scales, "zeros": None, "group_of": None,
            "bits": 4} | change  # fmt: skip
    with pytest.raises(UncoveredOpError, match=reason):
        product(torch.zeros(3, 256), Packed(**said, columns=256))
