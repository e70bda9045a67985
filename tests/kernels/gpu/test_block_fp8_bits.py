"""Every schedule of FP8 products gives a row the same bits, for any number of rows."""

import pytest
import torch

from bench.fp8 import products as bench
from ndcheck_kernels.cuda.products.fp8 import fp8_configs, fp8_matmul
from ndcheck_kernels.cuda.rows.quantise import quantise_rows
from ndcheck_kernels.ops.block_fp8 import dequantise, quantise_weight


def test_schedules_are_one_bit_class(tmp_path):
    assert bench.find_differences(tmp_path) == []


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 12288), (200, 1008)])
def test_products_are_near_those_of_the_codes(n, k):
    """float64 of the dequantised codes: what is left is the tensor cores' sum of a block."""
    torch.manual_seed(0)
    weight, scales = quantise_weight(torch.randn(n, k, device="cuda") * 0.02)
    codes, row_scales = quantise_rows(torch.randn(33, k, device="cuda"))
    got = fp8_matmul.fp8_matmul(codes, row_scales, weight, scales, dtype=torch.float32)
    rows = codes.double() * row_scales.double().repeat_interleave(128, 1)[:, :k]
    columns = dequantise(weight, scales, torch.float32).double()
    exact, size = rows @ columns.t(), rows.abs() @ columns.abs().t()
    # Hopper keeps 13 bits of the largest term while it adds 32 of them.
    assert ((got.double() - exact).abs() <= 2.0**-11 * size).all()
    assert ((got.double() - 1.01 * exact).abs() > 2.0**-11 * size).any()


def test_groups_have_the_bits_of_single_products():
    torch.manual_seed(0)
    weight, scales = quantise_weight(torch.randn(5, 640, 2064, device="cuda"))
    codes, row_scales = quantise_rows(torch.randn(700, 2064, device="cuda").bfloat16())
    ends = torch.tensor([3, 3, 90, 91, 700], dtype=torch.int32, device="cuda")
    starts = [0, *ends.tolist()[:-1]]
    for config in fp8_configs.selectable_configs(90):
        got = fp8_matmul._launch_grouped(
            codes, row_scales, weight, scales, ends, torch.float32, config
        )
        for group, (start, stop) in enumerate(zip(starts, ends.tolist(), strict=True)):
            if start < stop:
                operands = (codes, row_scales, weight[group], scales[group])
                alone = bench.some_rows(operands, config, start, stop - start)
                assert torch.equal(got[start:stop], alone)
