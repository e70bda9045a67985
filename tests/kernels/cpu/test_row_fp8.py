"""FP8 products with one scale a row on CPU, against float64."""

import pytest
import torch

from ndcheck_kernels import UncoveredOpError, invariant_kernels
from ndcheck_kernels.ops import row_fp8 as ops

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Half a unit in the last place of a normal code, and of a subnormal one, of the row's scale.
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10


def weights(*shape, n_scales=1):
    return ops.quantise_weight(torch.randn(shape) * 0.05, n_scales)


def product(rows, weight, scales, *rest):
    with invariant_kernels():
        return ops.linear_op(rows, weight, scales, *rest)


def exact(rows, weight, scales, unit):
    """float64 product of the rows as they are with the dequantised weights, and its budget.

    As in `test_block_fp8`: six times the root of the sum of the bounds' squares.
    """
    n = len(weight)
    w = weight.double() * scales.double().repeat_interleave(n // len(scales))[:, None]
    floor = unit.double().clamp(min=2.0**-126)[:, None] * ABSOLUTE
    error = (rows.double().abs() * RELATIVE).maximum(floor) * (1 + 2.0**-20)
    y = rows.double() @ w.t()
    size = rows.double().abs() @ w.abs().t()
    rounding = torch.finfo(rows.dtype).eps * y.abs() + 2.0**-18 * size
    tiny = torch.finfo(rows.dtype).smallest_normal * torch.finfo(rows.dtype).eps
    return y, 6 * (error**2 @ w.t() ** 2).sqrt() + rounding + max(tiny, 2.0**-148)


def largest(rows):
    return rows.double().abs().amax(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "n_scales"), [(128, 128, 1), (130, 260, 130), (96, 1000, 2)])
def test_products_are_as_accurate_as_the_format(n, k, n_scales, dtype):
    torch.manual_seed(0)
    rows = (torch.randn(13, k) * torch.logspace(-3, 3, 13)[:, None]).to(dtype)
    weight, scales = weights(n, k, n_scales=n_scales)
    y, budget = exact(rows, weight, scales, largest(rows) / 448)
    assert ((product(rows, weight, scales).double() - y).abs() <= budget).all()
    # The budget is one: rows that are a fourth too large leave it.
    coarse = (rows.double() * 5 / 4).to(dtype)
    assert ((product(coarse, weight, scales).double() - y).abs() > budget).any()


@pytest.mark.parametrize("scale", [0.0, 1e-45, 2.0**-126, 1.0, 2.0**100])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1.0, 2.0**100])
def test_scales_at_the_ends_of_the_range(scale, size):
    torch.manual_seed(0)
    rows = torch.randn(5, 256) * size
    if scale * size > 2.0**100:
        pytest.skip("the product itself leaves float32's range")
    weight, scales = ops.quantise_weight(torch.randn(128, 256), 128)[0], torch.full((128,), scale)
    y, budget = exact(rows, weight, scales, largest(rows) / 448)
    # s * t is rounded by half a unit of the smallest number, and a sum of codes multiplies that.
    got = product(rows, weight, scales).double()
    assert ((got - y).abs() <= budget + 448 * 448 * 256 * 2.0**-150).all()


@pytest.mark.parametrize("given", [0.0, 1e-45, 2.0**-126, 2.0**-5, 2.0**100])
def test_a_given_scale_bounds_a_row_as_saturation_does(given):
    """The reference rounds nothing but the rows: the exact numbers that e4m3 can hold, times it."""
    torch.manual_seed(0)
    rows = torch.randn(5, 256).bfloat16() * 10
    weight, scales = weights(128, 256, n_scales=128)
    unit = max(given, 2.0**-126)
    bounded = rows.double().clamp(-448 * unit, 448 * unit)
    y, budget = exact(bounded.float(), weight, scales, torch.full((5,), unit))
    got = product(rows, weight, scales, None, torch.tensor(given)).double()
    assert got.isfinite().all()
    assert ((got - y).abs() <= budget + torch.finfo(rows.dtype).eps * y.abs()).all()


def test_a_bound_is_the_largest_that_makes_a_scale():
    rows = torch.tensor([[3000.0, 1200.0, -600.0, 1.0], [3.0, 1.0, 0.0, 0.0]])
    codes, scales = ops.quantise_rows(rows, None, 1200.0)
    assert torch.equal(scales, torch.tensor([1200.0, 3.0]) / 448)
    assert codes[0].float().tolist()[:3] == [448, 448, -224]


def test_the_largest_rows_are_quantised_without_overflow():
    for dtype in DTYPES:
        most = torch.finfo(dtype).max
        codes, _ = ops.quantise_rows(torch.tensor([[most, -most, most / 3]], dtype=dtype))
        assert codes.float().tolist() == [[448, -448, 144]]


@pytest.mark.parametrize("given", [None, torch.tensor(2.0**-5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_its_bits_in_any_company(dtype, given):
    torch.manual_seed(0)
    weight, scales = weights(160, 390, n_scales=160)
    rows, bias = torch.randn(40, 390).to(dtype), torch.randn(160).to(dtype)
    alone = product(rows[:1], weight, scales, bias, given)
    for m in (2, 3, 16, 17, 40):
        for position in (0, m // 2, m - 1):
            batch = rows.roll(7, 0)[:m].clone()
            batch[0], batch[m - 1] = torch.nan, torch.inf
            batch[position] = rows[0]
            got = product(batch, weight, scales, bias, given)
            assert torch.equal(got[position], alone[0])


def test_a_scale_of_the_whole_batch_is_seen():
    """The planted fault: what dynamic quantisation per tensor does."""
    torch.manual_seed(0)
    weight, scales = weights(64, 256)
    rows = torch.randn(4, 256)
    rows[1] *= 100

    def faulty(batch):
        return product(batch, weight, scales, None, batch.abs().amax() / 448)

    assert not torch.equal(faulty(rows[:1])[0], faulty(rows)[0])
    assert torch.equal(product(rows[:1], weight, scales)[0], product(rows, weight, scales)[0])


@pytest.mark.parametrize("given", [None, torch.tensor([0.5, 2.0**-7, 2.0**-5])])
def test_groups_are_products_of_their_own(given):
    torch.manual_seed(0)
    weight, scales = weights(3, 96, 256, n_scales=2)
    rows, ends = torch.randn(9, 256), torch.tensor([4, 4, 9], dtype=torch.int32)
    with invariant_kernels() as scope:
        got = ops.grouped_op(rows, weight, scales, ends, given)
    assert scope.fires == {"row_fp8_grouped": 1}
    for group, part in ((0, slice(0, 4)), (2, slice(4, 9))):
        own = None if given is None else given[group]
        alone = product(rows[part], weight[group], scales[group], None, own)
        assert torch.equal(got[part], alone)


def test_dequantised_weights_are_within_their_format():
    torch.manual_seed(0)
    original = torch.randn(2, 200, 300) * torch.logspace(-6, 6, 200)[:, None]
    codes, scales = ops.quantise_weight(original, 200)
    back = ops.dequantise(codes, scales, torch.float32)
    error = (original.abs() * RELATIVE).maximum(scales[..., None] * ABSOLUTE) * 1.001
    assert ((back - original).abs() <= error).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scales": torch.ones(3)}, "their number divides that of the outputs"),
        ({"scales": torch.ones(1).double()}, "scales of torch.float64"),
        (
            {"weight": torch.zeros(64, 256, dtype=torch.float8_e5m2)},
            "weights are torch.float8_e5m2",
        ),
        ({"rows": torch.zeros(3, 256, dtype=torch.float64)}, "rows are torch.float64"),
        ({"given": torch.ones(2)}, "2 scales of rows, where a matrix has one"),
    ],
)
def test_what_is_not_in_the_contract_is_refused(change, reason):
    weight, scales = weights(64, 256)
    given = {"rows": torch.zeros(3, 256), "weight": weight, "scales": scales, "given": None}
    given |= change
    with pytest.raises(UncoveredOpError, match=reason):
        product(given["rows"], given["weight"], given["scales"], None, given["given"])
