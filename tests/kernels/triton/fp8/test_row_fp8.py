"""FP8 products of one scale a row on CUDA, or in the interpreter, have the bits of the CPU's."""

import pytest
import torch

from ndcheck_kernels.cpu import row_fp8 as on_cpu
from ndcheck_kernels.cuda.products.fp8 import row_fp8 as kernels
from ndcheck_kernels.cuda.products.fp8.fp8_configs import DEFAULT, selectable_configs
from ndcheck_kernels.cuda.rows import quantise
from ndcheck_kernels.ops import row_fp8 as ops

IS_GPU = torch.cuda.is_available()


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
        codes, scales = quantise.quantise_whole_rows(
            rows.to(device), None if each is None else each.to(device), bound
        )
        expected = ops.quantise_rows(rows, each, bound)
        assert torch.equal(bits(codes.cpu()), bits(expected[0]))
        assert torch.equal(scales.cpu(), expected[1])
    rows[4, 5], rows[5, 7] = torch.inf, torch.nan
    codes, _ = quantise.quantise_whole_rows(rows.to(device), None, bound)
    assert codes[5].float().isnan().any()
    assert codes[4].float().isnan().any() == (bound == float("inf"))


@pytest.mark.parametrize("config", selectable_configs(90), ids=str)
@pytest.mark.parametrize(("n", "k", "n_scales"), [(160, 384, 160), (128, 2128, 1), (160, 256, 2)])
def test_products_have_the_bits_of_the_cpu(config, n, k, n_scales, dtype, device):
    weight, scales = weights(n, k, device=device, n_scales=n_scales)
    bias = torch.randn(n, dtype=dtype, device=device)
    rows = rows_of(19, k, dtype, device)
    got = kernels._launch(*quantise.quantise_whole_rows(rows), weight, scales, bias, dtype, config)
    operands = (each.cpu() for each in (rows, weight, scales, bias))
    assert torch.equal(bits(got.cpu()), bits(on_cpu._linear(*operands, None, ops.UNBOUNDED)))


@pytest.mark.parametrize("config", dict.fromkeys(c for _, c in DEFAULT), ids=str)
def test_products_in_groups_are_those_of_each_group(config, dtype, device):
    weight, scales = weights(3, 160, 256, device=device, n_scales=2)
    rows = torch.randn(23, 256, dtype=dtype, device=device)
    ends = torch.tensor([4, 4, 23], dtype=torch.int32, device=device)
    codes, row_scales = quantise.quantise_whole_rows(rows)
    got = kernels._launch_grouped(codes, row_scales, weight, scales, ends, dtype, config)
    for group, part in ((0, slice(0, 4)), (2, slice(4, 23))):
        alone = kernels.row_fp8_matmul(
            *quantise.quantise_whole_rows(rows[part]), weight[group], scales[group], dtype=dtype
        )
        assert torch.equal(bits(got[part]), bits(alone))


def test_a_row_has_its_bits_in_any_company(device, batch_sizes, assert_batch_invariant):
    weight, scales = weights(160, 384, device=device, n_scales=160)
    rows = torch.randn(max(batch_sizes) + 1, 384, dtype=torch.float16, device=device)
    assert_batch_invariant(
        lambda x: kernels.row_fp8_matmul(
            *quantise.quantise_whole_rows(x), weight, scales, dtype=torch.float16
        ),
        rows,
        batch_sizes,
    )


def test_a_scale_of_the_whole_batch_is_seen(device, batch_sizes, assert_batch_invariant):
    """The planted fault: dynamic quantisation per tensor, which stock kernels have."""
    weight, scales = weights(160, 384, device=device, n_scales=160)
    rows = torch.randn(max(batch_sizes) + 1, 384, dtype=torch.float16, device=device)

    def faulty(x):
        shared = (x.float().nan_to_num(0, 0, 0).abs().amax() / 448).expand(len(x))
        codes = quantise.quantise_whole_rows(x, shared)
        return kernels.row_fp8_matmul(*codes, weight, scales, dtype=torch.float16)

    with pytest.raises(AssertionError):
        assert_batch_invariant(faulty, rows, batch_sizes)


def test_what_the_hardware_cannot_read_is_refused(device):
    weight, scales = weights(128, 200, device=device, n_scales=1)
    codes, row_scales = quantise.quantise_whole_rows(torch.randn(3, 200, device=device))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        kernels.row_fp8_matmul(codes, row_scales, weight, scales)
