"""Weights of 4 and 8 bits on CPU: dequantised for each product, which is that of plain weights."""

import torch

from ndcheck_kernels.cpu.products import addmm, groups_with_rows, mm
from ndcheck_kernels.ops import mxfp4
from ndcheck_kernels.ops.weight_only import Packed, dequantise, register_weight_only


def _product(rows: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    weight = dequantise(packed, rows.dtype).t()
    return mm(rows, weight) if bias is None else addmm(bias, rows, weight)


register_weight_only("cpu", _product)


def _experts(
    rows: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    out = rows.new_zeros(len(rows), blocks.shape[1])
    for expert, part in groups_with_rows(ends):
        weight = mxfp4.dequantise(blocks[expert], scales[expert], rows.dtype)
        # As the plain model has it: the order may follow how a weight lies in memory.
        out[part] = mm(rows[part], weight.t().contiguous())
    return out


mxfp4.register_mxfp4("cpu", _experts)
