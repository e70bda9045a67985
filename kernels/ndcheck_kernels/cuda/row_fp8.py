"""FP8 weights with a scale a tensor or an output on CUDA: importing this registers them."""

import torch

from ndcheck_kernels.cuda.overrides import covered
from ndcheck_kernels.cuda.products.fp8.row_fp8 import grouped_row_fp8_matmul, row_fp8_matmul
from ndcheck_kernels.cuda.rows.quantise import quantise_whole_rows
from ndcheck_kernels.ops.row_fp8 import register_row_fp8


@covered
def _linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    given: torch.Tensor | None,
    bound: float,
) -> torch.Tensor:
    codes = quantise_whole_rows(rows, given, bound)
    return row_fp8_matmul(*codes, weight, scales, bias, dtype=rows.dtype)


@covered
def _grouped(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    ends: torch.Tensor,
    given: torch.Tensor | None,
) -> torch.Tensor:
    codes = quantise_whole_rows(rows, given)
    return grouped_row_fp8_matmul(*codes, weight, scales, ends, dtype=rows.dtype)


register_row_fp8("cuda", _linear, _grouped)
