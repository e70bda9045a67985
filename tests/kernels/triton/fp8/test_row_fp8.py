"""FP8 products of one scale a row on CUDA, or in the interpreter, have the bits of the CPU's."""

import pytest
import torch

from ndcheck_kernels.cpu import row_fp8 as on_cpu
from ndcheck_kernels.cuda.products.fp8 import fp8_matmul as kernels
from ndcheck_kernels.cuda.products.fp8.fp8_configs import DEFAULT, selectable_configs
from ndcheck_kernels.cuda.rows import quantise
from ndcheck_kernels.cuda.rows.rms_norm import rms_norm
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul
from ndcheck_kernels.ops import row_fp8 as ops

IS_GPU = torch.cuda.is_available()


def quantised(rows, given=None, bound=ops.UNBOUNDED):
    return quantise.quantise_rows(rows, one_scale=quantise.OneScale(given, bound))


def bits(t):
    return t.contiguous().view(torch.uint8)


def weights(*shape, device, n_scales):
    codes, scales = ops.quantise_weight(torch.randn(shape) * 0.05, n_scales)
    if IS_GPU:  # Of few bits, so that every device sums a block exactly.
        codes = codes.float().sign().to(codes.dtype)
    return codes.to(device), scales.to(device)


def rows_of(m, k, dtype, device):
    rows = torch.randn(m, k) * torch.randint(-3, 4, (m, 1)).float().exp2()
    if IS_GPU:
        rows = torch.randint(-4, 5, (m, k)).float()
        rows[:, 0] = 448
    return rows.to(dtype).to(device)


@pytest.mark.parametrize("bound", [float("inf"), 2.0])
@pytest.mark.parametrize("k", [16, 208, 384])
def test_rows_are_quantised_as_on_the_cpu(k, bound, dtype, device):
    rows = torch.randn(9, k, dtype=dtype) * torch.logspace(-4, 4, 9)[:, None].to(dtype)
    rows[3] = 0
    given = torch.tensor([0.0, 1e-45, 1e-3, 1.0, 2.0**-126, 7.0, 1e-2, 1e30, 0.1])
    for each in (None, given):
        codes, scales = quantised(rows.to(device), None if each is None else each.to(device), bound)
        expected = ops.quantise_rows(rows, each, bound)
        assert torch.equal(bits(codes.cpu()), bits(expected[0]))
        assert torch.equal(scales.cpu(), expected[1])
    rows[4, 5], rows[5, 7] = torch.inf, torch.nan
    codes, _ = quantised(rows.to(device), None, bound)
    assert codes[5].float().isnan().any()
    assert codes[4].float().isnan().any() == (bound == float("inf"))


def test_quotients_next_to_a_tie_are_rounded_once(device):
    """The reference is the CPU's division; a product with the reciprocal goes the other way."""
    torch.manual_seed(0)
    m = 10_000 if IS_GPU else 60
    scales = (1 + torch.rand(m)) * torch.randint(-126, 100, (m,)).float().exp2()
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2 * scales[:, None]
    up = torch.full_like(ties, torch.inf)
    rows = torch.cat([ties, torch.nextafter(ties, up), -torch.nextafter(ties, -up)], 1)
    got = quantised(rows.to(device), scales.to(device))[0].cpu()
    assert torch.equal(bits(got), bits(ops.quantise_rows(rows, scales)[0]))
    by_product = (rows * (1 / scales[:, None])).to(torch.float8_e4m3fn)
    assert not torch.equal(bits(got), bits(by_product))


@pytest.mark.parametrize("bound", [float("inf"), 2.0])
@pytest.mark.parametrize(("m", "k"), [(5, 64), (3, 1040), (17, 1040), (9, 2064)])
def test_fused_quantisation_costs_no_bits(m, k, bound, dtype, device):
    # Integers, whose squares every order adds exactly.
    x, up = (torch.randint(-4, 5, (m, k), device=device).to(dtype) for _ in range(2))
    weight, places = torch.rand(k, dtype=dtype, device=device), torch.tensor([2, 0, 0])
    for given in (None, torch.rand(m, device=device)):
        one_scale = quantise.OneScale(given, bound)
        chosen = quantise.OneScale(None if given is None else given[:3], bound)
        for fused, apart, one in (
            (quantise.silu_mul_quantise(x, up, one_scale=one_scale), silu_mul(x, up), one_scale),
            (
                quantise.rms_norm_quantise(x, weight, 1e-6, one_scale=one_scale),
                rms_norm(x, weight, 1e-6),
                one_scale,
            ),
            (quantise.quantise_rows(x, places.to(device), one_scale=chosen), x[places], chosen),
        ):
            codes, scales = quantised(apart, one.given, bound)
            assert torch.equal(bits(fused[0]), bits(codes))
            assert torch.equal(fused[1], scales)
            own = None if one.given is None else one.given.cpu()
            expected = ops.quantise_rows(apart.cpu(), own, bound)
            assert torch.equal(bits(codes.cpu()), bits(expected[0]))


@pytest.mark.parametrize("config", selectable_configs(90, by_block=False), ids=str)
@pytest.mark.parametrize(("n", "k", "n_scales"), [(160, 384, 160), (128, 2128, 1), (160, 256, 2)])
def test_products_have_the_bits_of_the_cpu(config, n, k, n_scales, dtype, device):
    weight, scales = weights(n, k, device=device, n_scales=n_scales)
    bias = torch.randn(n, dtype=dtype, device=device)
    rows = rows_of(19, k, dtype, device)
    got = kernels._launch(*quantised(rows), weight, scales, bias, dtype, config)
    operands = (each.cpu() for each in (rows, weight, scales, bias))
    assert torch.equal(bits(got.cpu()), bits(on_cpu._linear(*operands, None, ops.UNBOUNDED)))


@pytest.mark.parametrize("config", dict.fromkeys(c for _, c in DEFAULT), ids=str)
def test_products_in_groups_are_those_of_each_group(config, dtype, device):
    weight, scales = weights(3, 160, 256, device=device, n_scales=2)
    rows = torch.randn(23, 256, dtype=dtype, device=device)
    ends = torch.tensor([4, 4, 23], dtype=torch.int32, device=device)
    codes, row_scales = quantised(rows)
    got = kernels._launch_grouped(codes, row_scales, weight, scales, ends, dtype, config)
    for group, part in ((0, slice(0, 4)), (2, slice(4, 23))):
        alone = kernels.fp8_matmul(
            *quantised(rows[part]), weight[group], scales[group], dtype=dtype
        )
        assert torch.equal(bits(got[part]), bits(alone))


def test_a_row_has_its_bits_in_any_company(device, batch_sizes, assert_batch_invariant):
    weight, scales = weights(160, 384, device=device, n_scales=160)
    rows = torch.randn(max(batch_sizes) + 1, 384, dtype=torch.float16, device=device)
    assert_batch_invariant(
        lambda x: kernels.fp8_matmul(*quantised(x), weight, scales, dtype=torch.float16),
        rows,
        batch_sizes,
    )


def test_a_scale_of_the_whole_batch_is_seen(device, batch_sizes, assert_batch_invariant):
    """The planted fault: dynamic quantisation per tensor, which stock kernels have."""
    weight, scales = weights(160, 384, device=device, n_scales=160)
    rows = torch.randn(max(batch_sizes) + 1, 384, dtype=torch.float16, device=device)

    def faulty(x):
        shared = (x.float().nan_to_num(0, 0, 0).abs().amax() / 448).expand(len(x))
        codes = quantised(x, shared)
        return kernels.fp8_matmul(*codes, weight, scales, dtype=torch.float16)

    with pytest.raises(AssertionError):
        assert_batch_invariant(faulty, rows, batch_sizes)


def test_what_the_hardware_cannot_read_is_refused(device):
    weight, scales = weights(128, 200, device=device, n_scales=1)
    codes, row_scales = quantised(torch.randn(3, 200, device=device))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        kernels.fp8_matmul(codes, row_scales, weight, scales)
