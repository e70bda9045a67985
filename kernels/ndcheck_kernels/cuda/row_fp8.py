"""FP8 weights with a scale a tensor or an output on CUDA: importing this registers them."""

import torch

from ndcheck_kernels.cuda.overrides import covered
from ndcheck_kernels.cuda.products.fp8.fp8_matmul import fp8_matmul, grouped_fp8_matmul
from ndcheck_kernels.cuda.rows.quantise import OneScale, quantise_rows
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
    codes = quantise_rows(rows, one_scale=OneScale(given, bound))
    return fp8_matmul(*codes, weight, scales.contiguous(), bias, dtype=rows.dtype)


@covered
def _grouped(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    ends: torch.Tensor,
    given: torch.Tensor | None,
) -> torch.Tensor:
    codes = quantise_rows(rows, one_scale=OneScale(given))
    return grouped_fp8_matmul(*codes, weight, scales.contiguous(), ends, dtype=rows.dtype)


register_row_fp8("cuda", _linear, _grouped)
