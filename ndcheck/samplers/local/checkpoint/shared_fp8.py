"""FP8 layers that ranks share, as the stock arm computes them.

transformers' own kernels know no shards. Here each rank multiplies by its part of the weights, made
plain for each product, and torch's all-reduce adds the parts, rounded to the model's dtype.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


def share_stock_products(model: Any, layers: list[Any]) -> None:
    """Let a model's FP8 ``layers`` on ranks compute so."""
    from ndcheck_kernels.models.tensor_parallel import styles

    mesh = model._device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    style_of = styles(model)
    for layer in layers:
        if type(layer).__name__ == "FP8Linear":
            sums = group if style_of.get(layer) == "rowwise" else None
            layer.forward = partial(_linear, layer, sums)
        else:
            layer.forward = partial(_experts, layer, group)


def _linear(layer: Any, group: Any, x: torch.Tensor) -> torch.Tensor:
    """``group``: over which the parts are added; None where a rank has whole outputs."""
    out = F.linear(x, _plain(_here(layer.weight), _here(layer.weight_scale_inv), x.dtype))
    if group is not None:
        dist.all_reduce(out, group=group)
    return out if layer.bias is None else out + _here(layer.bias)


def _experts(
    layer: Any, group: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """x [T, H], both others [T, k] -> [T, H]: one expert after the other."""
    gate_up, down = _here(layer.gate_up_proj), _here(layer.down_proj)
    gate_up_scales, down_scales = (
        _here(layer.gate_up_proj_scale_inv),
        _here(layer.down_proj_scale_inv),
    )
    out = torch.zeros_like(x)
    for expert in index.flatten().bincount().nonzero().flatten().tolist():
        token, nth = (index == expert).nonzero(as_tuple=True)
        hidden = F.linear(x[token], _plain(gate_up[expert], gate_up_scales[expert], x.dtype))
        hidden = layer._apply_gate(hidden)
        hidden = F.linear(hidden, _plain(down[expert], down_scales[expert], x.dtype))
        out.index_add_(0, token, (hidden * weights[token, nth, None]).to(x.dtype))
    dist.all_reduce(out, group=group)
    return out


def _plain(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from ndcheck_kernels.ops.block_fp8 import dequantise

    return dequantise(codes, scales, dtype)


def _here(parameter: torch.Tensor) -> torch.Tensor:
    from ndcheck_kernels.models.interface import here

    return here(parameter)
