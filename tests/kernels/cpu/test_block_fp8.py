"""FP8 products on CPU, against float64 and exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndcheck_kernels import UncoveredOpError, invariant_kernels
from ndcheck_kernels.cpu.block_fp8 import fused_multiply_add
from ndcheck_kernels.ops import block_fp8 as ops

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Half a unit in the last place of a normal code, and of a subnormal one, of a scale of its block.
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10


def weights(*shape):
    return ops.quantise_weight(torch.randn(shape) * 0.05)


def product(rows, weight, scales, bias=None):
    with invariant_kernels():
        return ops.linear_op(rows, weight, scales, bias)


def exact(rows, weight, scales):
    """float64 product of the rows as they are with torch's dequantised weights, and its budget.

    A quotient's rounding error is bounded and has either sign as often: six times the root of the
    sum of the bounds' squares is left once in 30 million times (Hoeffding, 1963).
    """
    n, k = weight.shape
    wide = scales.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    w = weight.double() * wide
    blocks = torch.nn.functional.pad(rows.double(), (0, -k % 128)).view(len(rows), -1, 128)
    unit = (blocks.abs().amax(-1) / 448).clamp(min=2.0**-126)
    floor = unit.repeat_interleave(128, 1)[:, :k] * ABSOLUTE
    error = (rows.double().abs() * RELATIVE).maximum(floor) * (1 + 2.0**-20)
    y = rows.double() @ w.t()
    rounding = torch.finfo(rows.dtype).eps * y.abs() + 2.0**-18 * rows.double().abs() @ w.abs().t()
    tiny = torch.finfo(rows.dtype).smallest_normal * torch.finfo(rows.dtype).eps
    return y, 6 * (error**2 @ w.t() ** 2).sqrt() + rounding + max(tiny, 2.0**-148 * k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(128, 128), (130, 260), (96, 1000)])
def test_products_are_as_accurate_as_the_format(n, k, dtype):
    torch.manual_seed(0)
    rows = (torch.randn(13, k) * torch.logspace(-3, 3, 13)[:, None]).to(dtype)
    weight, scales = weights(n, k)
    y, budget = exact(rows, weight, scales)
    assert ((product(rows, weight, scales).double() - y).abs() <= budget).all()
    # The budget is one: rows that are a seventh too large leave it.
    coarse = (rows.double() * 8 / 7).to(dtype)
    assert ((product(coarse, weight, scales).double() - y).abs() > budget).any()


@pytest.mark.parametrize("scale", [0.0, 1e-45, 2.0**-126, 1.0, 2.0**100])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1.0, 2.0**100])
def test_scales_at_the_ends_of_the_range(scale, size):
    torch.manual_seed(0)
    rows = torch.randn(5, 256) * size
    if scale * size > 2.0**120:
        pytest.skip("the product itself leaves float32's range")
    weight, scales = ops.quantise_weight(torch.randn(128, 256))[0], torch.full((1, 2), scale)
    y, budget = exact(rows, weight, scales)
    got = product(rows, weight, scales).double()
    assert ((got - y).abs() <= budget + 448 * 448 * 256 * 2.0**-149).all()


def test_the_largest_rows_are_quantised_without_overflow():
    for dtype in DTYPES:
        largest = torch.finfo(dtype).max
        rows = torch.tensor([[largest, -largest, largest / 3] + [0.0] * 125], dtype=dtype)
        codes, scales = ops.quantise_rows(rows)
        assert codes.float().tolist()[0][:3] == [448, -448, 144]
        assert scales.double().item() == pytest.approx(largest / 448, rel=2.0**-23)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300)
)
@settings(deadline=None)
def test_codes_are_nearest(values):
    codes, scales = ops.quantise_rows(torch.tensor([values]))
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[grid.isfinite()]
    wide = scales.double().repeat_interleave(128, 1)[:, : len(values)]
    quotients = (torch.tensor(values, dtype=torch.float64) / wide)[0]
    nearest = (grid[:, None] - quotients).abs().amin(0)
    assert ((codes[0].double() - quotients).abs() <= nearest * (1 + 1e-6) + 1e-6 * 448).all()


floats = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda x: abs(x) < 1e18)


@given(floats, floats, floats)
def test_fused_multiply_add_rounds_the_exact_value(a, b, c):
    got = fused_multiply_add(*(torch.tensor([x], dtype=torch.float32) for x in (a, b, c))).item()
    value = Fraction(a) * Fraction(b) + Fraction(c)
    below, above = (
        float(np.nextafter(np.float32(got), np.float32(end))) for end in (-np.inf, np.inf)
    )
    error = abs(Fraction(got) - value)
    for other in (below, above):
        if np.isfinite(other):
            away = abs(Fraction(other) - value)
            is_even = np.float32(got).view(np.uint32) % 2 == 0
            assert error < away or (error == away and is_even)


def test_fused_multiply_add_passes_infinities_and_nan():
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([inf, -inf, inf, nan, 1.0, 3e38])
    b = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 3e38])
    c = torch.tensor([1.0, 1.0, 1.0, 1.0, -inf, 1.0])
    got = fused_multiply_add(a, b, c)
    assert got[[0, 1, 4, 5]].tolist() == [inf, -inf, -inf, inf]
    assert got[[2, 3]].isnan().all()


def test_groups_of_1024_columns_are_summed_apart():
    """Whoever has the columns of one group gets its sum; added in float32, they are the product."""
    torch.manual_seed(0)
    weight, scales = weights(96, 3 * 1024 + 400)
    rows = torch.randn(7, weight.shape[1])
    parts = [
        product(rows[:, k : k + 1024], weight[:, k : k + 1024], scales[:, k // 128 :][:, :8])
        for k in range(0, weight.shape[1], 1024)
    ]
    assert torch.equal(product(rows, weight, scales), parts[0] + parts[1] + parts[2] + parts[3])
    assert not torch.equal(sum(parts), sum(reversed(parts)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_its_bits_in_any_company(dtype):
    torch.manual_seed(0)
    weight, scales = weights(160, 1158)
    rows = torch.randn(40, 1158).to(dtype)
    bias = torch.randn(160).to(dtype)
    alone = product(rows[:1], weight, scales, bias)
    for m in (2, 3, 16, 17, 40):
        for position in (0, m // 2, m - 1):
            batch = rows.roll(7, 0)[:m].clone()
            batch[0], batch[m - 1] = torch.nan, torch.inf
            batch[position] = rows[0]
            assert torch.equal(product(batch, weight, scales, bias)[position], alone[0])


def test_a_scale_of_the_whole_batch_is_seen():
    """The planted fault: what a quantiser does that knows one scale only."""
    torch.manual_seed(0)
    weight, scales = weights(64, 256)
    rows = torch.randn(4, 256)
    rows[1] *= 100

    def faulty(batch):
        shared = batch.abs().amax() / 448
        codes = (batch / shared).to(torch.float8_e4m3fn)
        return product(codes.float() * shared, weight, scales)

    assert not torch.equal(faulty(rows[:1])[0], faulty(rows)[0])
    assert torch.equal(product(rows[:1], weight, scales)[0], product(rows, weight, scales)[0])


def test_groups_are_products_of_their_own():
    torch.manual_seed(0)
    weight, scales = weights(3, 96, 256)
    rows, ends = torch.randn(9, 256), torch.tensor([4, 4, 9], dtype=torch.int32)
    with invariant_kernels() as scope:
        got = ops.grouped_op(rows, weight, scales, ends)
        part = ops.partial_grouped_op(rows.bfloat16(), weight, scales, ends)
    assert scope.fires == {"block_fp8_grouped": 1, "partial_block_fp8_grouped": 1}
    assert torch.equal(got[:4], product(rows[:4], weight[0], scales[0]))
    assert torch.equal(got[4:], product(rows[4:], weight[2], scales[2]))
    assert part.dtype == torch.float32


def test_dequantised_weights_are_within_their_format():
    torch.manual_seed(0)
    original = torch.randn(2, 200, 300) * torch.logspace(-6, 6, 300)
    codes, scales = ops.quantise_weight(original)
    assert scales.shape == (2, 2, 3)
    back = ops.dequantise(codes, scales, torch.float32)
    unit = scales.repeat_interleave(128, 1)[:, :200].repeat_interleave(128, 2)[..., :300]
    assert (
        (back - original).abs() <= (original.abs() * RELATIVE).maximum(unit * ABSOLUTE) * 1.001
    ).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scales": torch.ones(1, 1)}, r"blocks of 128 x 128 have \(1, 2\)"),
        ({"scales": torch.ones(1, 2).double()}, "scales of torch.float64"),
        (
            {"weight": torch.zeros(64, 256, dtype=torch.float8_e5m2)},
            "weights are torch.float8_e5m2",
        ),
        ({"rows": torch.zeros(3, 256, dtype=torch.float64)}, "rows are torch.float64"),
    ],
)
def test_what_is_not_in_the_contract_is_refused(change, reason):
    weight, scales = weights(64, 256)
    given = {"rows": torch.zeros(3, 256), "weight": weight, "scales": scales} | change
    with pytest.raises(UncoveredOpError, match=reason):
        product(**given)


def test_the_op_runs_in_a_scope_only():
    weight, scales = weights(64, 256)
    with pytest.raises(RuntimeError, match="only runs inside"):
        ops.linear_op(torch.zeros(3, 256), weight, scales)
