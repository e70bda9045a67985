"""FP8 weights in blocks of 128 x 128 on CPU, as `ops.block_fp8` says.

Reduction order inside a block: none. The products of e4m3 codes are multiples of 2**-18 below
    2**18, so that float64 holds every sum of 128 of them exactly; it is rounded to float32 once.
"""

from collections.abc import Callable

import torch

from ndcheck_kernels.cpu.products import groups_with_rows
from ndcheck_kernels.ops.block_fp8 import BLOCK, GROUP, quantise_rows, register_block_fp8


def _linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    codes, row_scales = quantise_rows(rows)
    by_column = scales.repeat_interleave(BLOCK, 0)[: len(weight)]

    def add(total: torch.Tensor, block: int, products: torch.Tensor) -> torch.Tensor:
        factors = row_scales[:, block, None] * by_column[:, block]
        return fused_multiply_add(products, factors, total)

    total = sum_by_groups(codes, weight, add)
    if bias is not None:
        total = total + bias.float()
    return total.to(dtype)


def _grouped(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    ends: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    out = rows.new_zeros(len(rows), weight.shape[1], dtype=dtype)
    for group, part in groups_with_rows(ends):
        out[part] = _linear(rows[part], weight[group], scales[group], None, dtype)
    return out


def sum_by_groups(
    codes: torch.Tensor,
    weight: torch.Tensor,
    add: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The sum [M, N] of the blocks of K, which enter that of their group by ``add``."""
    total = torch.zeros(len(codes), len(weight))
    part = torch.zeros_like(total)
    for block, (left, right) in enumerate(
        zip(codes.split(BLOCK, 1), weight.split(BLOCK, 1), strict=True)
    ):
        part = add(part, block, (left.double() @ right.double().t()).float())
        if (block + 1) * BLOCK % GROUP == 0:
            total, part = total + part, torch.zeros_like(total)
    return total + part


def fused_multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of float32, rounded once, which torch does in some lanes of a vector only.

    float64 holds the product. Its sum with c is rounded to odd (Boldo and Melquiond, 2008), so that
    rounding it again to float32 is as if it had been exact.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    part = total - product
    lost = (product - (total - part)) + (addend - part)  # Knuth's two-sum: exact.
    bits = total.view(torch.int64)
    away = torch.where((lost > 0) == (total > 0), 1, -1)
    is_even = (bits & 1) == 0
    # Not `lost != 0`, which NaN is: of infinities.
    return torch.where((lost.abs() > 0) & is_even, bits + away, bits).view(torch.float64).float()


register_block_fp8("cpu", _linear, _grouped)
