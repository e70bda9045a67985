"""Layers whose weights transformers keeps quantised: those that are computed so, and the refusals.

Covered are transformers' `FP8Linear` and `FP8Experts` with float32 scales: in blocks of 128 x 128
with rows quantised as they come (`ops.block_fp8`); or with a scale a tensor or an output, and rows
of one scale each, their own or a calibration's (`ops.row_fp8`). transformers' own kernels for them
choose a library, and with it an order, by what is installed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ndcheck_kernels.models.interface import here
from ndcheck_kernels.models.weight_only import is_packed
from ndcheck_kernels.ops import row_fp8
from ndcheck_kernels.ops.block_fp8 import BLOCK, grouped_op, linear_op
from ndcheck_kernels.ops.library import NAME

_LINEAR, _EXPERTS = "FP8Linear", "FP8Experts"
ROW_BOUND = "largest_of_a_row"
"""A layer's attribute: the largest magnitude from which a row's scale is made, where it has one."""


def is_block_fp8(module: torch.nn.Module) -> bool:
    """Is it a layer with FP8 weights in blocks that the kernels cover?"""
    return is_fp8(module) and module.block_size is not None


def is_row_fp8(module: torch.nn.Module) -> bool:
    """Is it one with FP8 weights of a scale a tensor or an output that the kernels cover?"""
    return is_fp8(module) and module.block_size is None


def is_fp8(module: torch.nn.Module) -> bool:
    """Is it a layer with FP8 weights that the kernels cover?"""
    return type(module).__name__ in (_LINEAR, _EXPERTS) and _reason_against(module) is None


def row_bound(layer: Any) -> float:
    """The largest magnitude from which such a layer makes the scale of a row."""
    return float(getattr(layer, ROW_BOUND, row_fp8.UNBOUNDED))


def refused_weight(module: Any) -> tuple[str, torch.dtype, str] | None:
    """Name, dtype and reason of a quantised weight that nothing here computes with; else None."""
    if is_fp8(module) or is_packed(module):
        return None
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, tensor in tensors:
        packed = tensor.dtype == torch.int32 and "weight" in name
        narrow = tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool
        wrapped = is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "device_mesh")
        if packed or narrow or wrapped:
            reason = _reason_against(module) if type(module).__name__ in (_LINEAR, _EXPERTS) else ""
            return name, tensor.dtype, reason or "no kernel reads this layout"
    return None


def _reason_against(layer: Any) -> str | None:
    size = layer.block_size
    if size is not None and tuple(size) != (BLOCK, BLOCK):
        return f"blocks of {size[0]} x {size[1]}, where {BLOCK} x {BLOCK} is covered"
    if size is not None and layer.activation_scheme != "dynamic":
        return "its rows are quantised by a scale from calibration, not by their own"
    for name, tensor in layer.named_parameters(recurse=False):
        if name.endswith("_scale_inv") and tensor.dtype != torch.float32:
            return f"its scales are {tensor.dtype}, where float32 is covered"
        if tensor.dtype == torch.int8:
            return "its weights are FP4"
    if size is not None and type(layer).__name__ == _EXPERTS and layer.intermediate_dim % BLOCK:
        return f"blocks of {BLOCK} would span gates and values of {layer.intermediate_dim} features"
    return None


def register_fp8_experts(forward: Any) -> None:
    """Make `experts_implementation="ndcheck_invariant"` known to transformers' FP8 experts."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, forward)


@contextmanager
def invariant_fp8_layers(model: torch.nn.Module) -> Iterator[None]:
    """Compute the model's FP8 linear layers by `ops.block_fp8`; at the end as before."""
    layers = [m for m in model.modules() if type(m).__name__ == _LINEAR]
    own = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(_linear, layer)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            layer.__dict__.pop("forward", None)  # The class's own shows again,
            if forward is not None:
                layer.forward = forward  # or what was put over it.


def _linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else here(layer.bias)
    weight, scales = here(layer.weight), here(layer.weight_scale_inv)
    out: torch.Tensor
    if layer.block_size is None:
        given, bound = layer.activation_scale, row_bound(layer)
        out = row_fp8.linear_op(x, weight, scales.reshape(-1), bias, given, bound)
    else:
        out = linear_op(x, weight, scales, bias)
    return out


def expert_products(layer: Any, name: str, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows [P, K] in order of experts, times the weights of an FP8 layer's ``name`` -> [P, N]."""
    weight, scales = getattr(layer, name), getattr(layer, f"{name}_scale_inv")
    out: torch.Tensor
    if layer.block_size is None:
        given = getattr(layer, f"{name}_activation_scale", None)
        out = row_fp8.grouped_op(rows, weight, scales.reshape(len(weight), -1), ends, given)
    else:
        out = grouped_op(rows, weight, scales, ends)
    return out
