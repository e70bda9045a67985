"""FP8 products on CUDA, or in the interpreter, have the bits of the CPU's where block sums are."""

import pytest
import torch

from ndcheck_kernels.cpu import block_fp8 as on_cpu
from ndcheck_kernels.cuda.products.fp8 import fp8_configs
from ndcheck_kernels.cuda.products.fp8 import fp8_matmul as kernels
from ndcheck_kernels.cuda.rows import quantise, rms_norm, silu_mul
from ndcheck_kernels.ops import block_fp8 as ops

IS_GPU = torch.cuda.is_available()
BY_HAND = tuple(fp8_configs.Fp8Config(rows, 64, 4, 4, hopper=True) for rows in (64, 128))
"""Where there is no Hopper, they are schedules of the kernel that any device runs."""


def bits(t):
    return t.contiguous().view(torch.uint8)


def weights(*shape, device):
    codes, scales = ops.quantise_weight(torch.randn(shape) * 0.05)
    return codes.to(device), scales.to(device)


def exact_rows(m, k, dtype, device):
    """Rows whose codes are few bits, so that every device sums a block exactly."""
    rows = torch.randint(-4, 5, (m, k)).to(dtype)
    rows[:, ::128] = 448
    return (rows * torch.randint(-3, 4, (m, 1)).float().exp2().to(dtype)).to(device)


@pytest.mark.parametrize("k", [128, 208, 384])
def test_rows_are_quantised_as_on_the_cpu(k, dtype, device):
    rows = torch.randn(9, k, dtype=dtype) * torch.logspace(-4, 4, 9)[:, None].to(dtype)
    rows[3], rows[4, 5], rows[5, 7] = 0, torch.inf, torch.nan
    codes, scales = quantise.quantise_rows(rows.to(device))
    expected = ops.quantise_rows(rows)
    assert codes[4:6].float().isnan().any(-1).all()
    is_finite = torch.arange(9) // 2 != 2
    assert torch.equal(bits(codes.cpu())[is_finite], bits(expected[0])[is_finite])
    assert torch.equal(scales.cpu()[is_finite], expected[1][is_finite])
    chosen = torch.tensor([8, 0, 0, 2], device=device)
    assert torch.equal(
        bits(quantise.quantise_rows(rows.to(device), chosen)[0]), bits(codes[chosen])
    )


@pytest.mark.parametrize("k", [128, 200, 384])
def test_fused_quantisation_costs_no_bits(k, dtype, device):
    x, up = (torch.randn(5, k, dtype=dtype, device=device) for _ in range(2))
    weight = torch.rand(k, dtype=dtype, device=device)
    for fused, apart in (
        (quantise.silu_mul_quantise(x, up), silu_mul.silu_mul(x, up)),
        (quantise.rms_norm_quantise(x, weight, 1e-6), rms_norm.rms_norm(x, weight, 1e-6)),
    ):
        codes, scales = quantise.quantise_rows(apart)
        assert torch.equal(bits(fused[0]), bits(codes))
        assert torch.equal(fused[1], scales)


@pytest.mark.parametrize("config", [*fp8_configs.selectable_configs(90), *BY_HAND], ids=str)
@pytest.mark.parametrize(("n", "k"), [(160, 384), (128, 2128)])
def test_products_have_the_bits_of_the_cpu(config, n, k, dtype, device):
    weight, scales = weights(n, k, device=device)
    bias = torch.randn(n, dtype=dtype, device=device)
    draw = exact_rows if IS_GPU else lambda m, k, dtype, device: torch.randn(m, k, dtype=dtype)
    rows = draw(19, k, dtype, device)
    if IS_GPU:
        weight = weight.float().sign().to(weight.dtype)
    got = kernels._launch(*quantise.quantise_rows(rows), weight, scales, bias, dtype, config)
    expected = on_cpu._linear(rows.cpu(), weight.cpu(), scales.cpu(), bias.cpu(), dtype)
    assert torch.equal(bits(got.cpu()), bits(expected))


@pytest.mark.parametrize("config", dict.fromkeys(c for _, c in fp8_configs.DEFAULT), ids=str)
def test_products_in_groups_are_those_of_each_group(config, dtype, device):
    weight, scales = weights(3, 160, 256, device=device)
    rows = torch.randn(23, 256, dtype=dtype, device=device)
    ends = torch.tensor([4, 4, 23], dtype=torch.int32, device=device)
    codes, row_scales = quantise.quantise_rows(rows)
    got = kernels._launch_grouped(codes, row_scales, weight, scales, ends, dtype, config)
    for group, part in ((0, slice(0, 4)), (2, slice(4, 23))):
        alone = kernels.fp8_matmul(
            *quantise.quantise_rows(rows[part]), weight[group], scales[group], dtype=dtype
        )
        assert torch.equal(bits(got[part]), bits(alone))


def test_a_row_has_its_bits_in_any_company(device, batch_sizes, assert_batch_invariant):
    weight, scales = weights(160, 384, device=device)
    rows = torch.randn(max(batch_sizes) + 1, 384, dtype=torch.float16, device=device)
    assert_batch_invariant(
        lambda x: kernels.fp8_matmul(
            *quantise.quantise_rows(x), weight, scales, dtype=torch.float16
        ),
        rows,
        batch_sizes,
    )


def test_a_scale_that_follows_the_batch_is_seen(device, batch_sizes, assert_batch_invariant):
    """The planted fault: one scale for all rows of a batch, as static quantisers calibrate it."""
    weight, scales = weights(160, 384, device=device)
    rows = torch.randn(max(batch_sizes) + 1, 384, dtype=torch.float16, device=device)

    def faulty(x):
        codes, row_scales = quantise.quantise_rows(x)
        shared = row_scales.nan_to_num(1, posinf=1).amax(0).expand_as(row_scales)
        return kernels.fp8_matmul(
            codes, shared.t().contiguous().t(), weight, scales, dtype=torch.float16
        )

    with pytest.raises(AssertionError):
        assert_batch_invariant(faulty, rows, batch_sizes)


def test_what_the_hardware_cannot_read_is_refused(device):
    weight, scales = weights(128, 200, device=device)
    codes, row_scales = quantise.quantise_rows(torch.randn(3, 200, device=device))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        kernels.fp8_matmul(codes, row_scales, weight, scales)
