"""Weights of 4 and 8 bits on CPU: dequantised for each product, which is that of plain weights."""

import torch

from ndcheck_kernels.cpu.products import addmm, mm
from ndcheck_kernels.ops.weight_only import Packed, dequantise, register_weight_only


def _product(rows: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    weight = dequantise(packed, rows.dtype).t()
    return mm(rows, weight) if bias is None else addmm(bias, rows, weight)


register_weight_only("cpu", _product)
