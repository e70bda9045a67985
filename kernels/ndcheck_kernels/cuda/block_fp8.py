"""FP8 weights in blocks on CUDA: importing this registers them."""

import torch

from ndcheck_kernels.cuda.overrides import covered
from ndcheck_kernels.cuda.products.fp8.fp8_matmul import fp8_matmul, grouped_fp8_matmul
from ndcheck_kernels.cuda.rows.quantise import quantise_rows
from ndcheck_kernels.ops.block_fp8 import register_block_fp8


@covered
def _linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return fp8_matmul(*quantise_rows(rows), weight, scales, bias, dtype=dtype)


@covered
def _grouped(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    ends: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    codes, row_scales = quantise_rows(rows)
    return grouped_fp8_matmul(codes, row_scales, weight, scales, ends, dtype=dtype)


register_block_fp8("cuda", _linear, _grouped)
