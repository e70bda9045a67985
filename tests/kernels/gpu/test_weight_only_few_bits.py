"""The product for few rows of 4-bit weights gives the very bits of `matmul` with plain weights."""

import pytest
import torch

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import k_groups
from ndcheck_kernels.cuda.products import weight_only
from ndcheck_kernels.cuda.products.matmul import matmul
from ndcheck_kernels.cuda.products.weight_only import FEW_ROWS
from ndcheck_kernels.ops.weight_only import Packed, dequantise

DEVICE = torch.device("cuda", 0)
CONFIGS = [FEW_ROWS]
ROWS = (1, 2, 15, 16, 17, 32, 33, 128, 600)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not device.has_hopper_kernels(DEVICE),
    reason="needs compute capability 9.0 and Triton 3.6",
)


def draw(n, k):
    """Wide range and cancellation; scales of every group and size, 0 and subnormal ones too."""
    exponent = torch.randint(-6, 6, (max(ROWS), k), device=DEVICE)
    rows = (torch.randn(max(ROWS), k, device=DEVICE) * 2.0**exponent).bfloat16()
    scales = torch.randn(k // 128, n, device=DEVICE)
    scales = (scales * 2.0 ** torch.randint(-9, 3, scales.shape, device=DEVICE)).bfloat16()
    scales[:, :3] = torch.tensor([0.0, 1e-39, -1e30], device=DEVICE).bfloat16()
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
    return rows, Packed(codes, scales, None, None, 4, k)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4104, 4352), (24576, 4096), (4096, 12288)])
def test_few_rows_have_the_bits_of_plain_weights(n, k, config):
    assert k_groups(n, k, 2, device.capability(DEVICE)) == 1
    rows, packed = draw(n, k)
    assert weight_only.can_fuse(rows, packed)  # Other shapes come to no such product.
    weight = dequantise(packed, torch.bfloat16)
    bias = torch.randn(n, dtype=torch.bfloat16, device=DEVICE)
    residual = torch.randn(max(ROWS), n, dtype=torch.bfloat16, device=DEVICE)
    for m in ROWS:
        for addend in (None, bias, residual[:m]):
            got = weight_only._launch(rows[:m], packed, addend, config)
            expected = matmul(rows[:m], weight.t(), addend)
            assert torch.equal(got, expected), m


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_scales_of_another_group_are_seen(config):
    """The control: each group with its neighbour's scales."""
    rows, packed = draw(4096, 4096)
    moved = Packed(packed.codes, packed.scales.roll(1, 0), None, None, 4, 4096)
    got = weight_only._launch(rows[:16], moved, None, config)
    expected = matmul(rows[:16], dequantise(packed, torch.bfloat16).t())
    assert not torch.equal(got, expected)
