"""FP8 weights with a scale a tensor or an output on CPU, as `ops.row_fp8` says.

Reduction order inside a block: none, as in `cpu.block_fp8`.
"""

import torch

from ndcheck_kernels.cpu.block_fp8 import sum_by_groups
from ndcheck_kernels.cpu.products import groups_with_rows
from ndcheck_kernels.ops.row_fp8 import UNBOUNDED, quantise_rows, register_row_fp8


def _linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    given: torch.Tensor | None,
    bound: float,
) -> torch.Tensor:
    codes, row_scales = quantise_rows(rows, given, bound)
    total = sum_by_groups(codes, weight, lambda part, _, products: part + products)
    by_output = scales.repeat_interleave(len(weight) // len(scales))
    total = total * (row_scales[:, None] * by_output)
    if bias is not None:
        total = total + bias.float()
    return total.to(rows.dtype)


def _grouped(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    ends: torch.Tensor,
    given: torch.Tensor | None,
) -> torch.Tensor:
    out = rows.new_zeros(len(rows), weight.shape[1])
    for group, part in groups_with_rows(ends):
        own = None if given is None else given[part]
        out[part] = _linear(rows[part], weight[group], scales[group], None, own, UNBOUNDED)
    return out


register_row_fp8("cpu", _linear, _grouped)
