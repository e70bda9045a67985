"""Layers whose weights transformers keeps quantised: those that are computed so, and the refusals.

Covered are transformers' `FP8Linear` and `FP8Experts` with blocks of 128 x 128, float32 scales and
rows quantised as they come (`ops.block_fp8`). transformers' own kernels for them choose a library,
and with it an order, by what is installed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ndcheck_kernels.models.interface import here
from ndcheck_kernels.models.weight_only import is_packed
from ndcheck_kernels.ops.block_fp8 import BLOCK, linear_op
from ndcheck_kernels.ops.library import NAME

_LINEAR, _EXPERTS = "FP8Linear", "FP8Experts"


def is_block_fp8(module: torch.nn.Module) -> bool:
    """Is it a layer with FP8 weights in blocks that the kernels cover?"""
    return type(module).__name__ in (_LINEAR, _EXPERTS) and _reason_against(module) is None


def refused_weight(module: Any) -> tuple[str, torch.dtype, str] | None:
    """Name, dtype and reason of a quantised weight that nothing here computes with; else None."""
    if is_block_fp8(module) or is_packed(module):
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
    if size is None or tuple(size) != (BLOCK, BLOCK):
        scales = "one scale a tensor" if size is None else f"blocks of {size[0]} x {size[1]}"
        return f"{scales}, where {BLOCK} x {BLOCK} is covered"
    if layer.activation_scheme != "dynamic":
        return "its rows are quantised by a scale from calibration, not by their own"
    for name, tensor in layer.named_parameters(recurse=False):
        if name.endswith("_scale_inv") and tensor.dtype != torch.float32:
            return f"its scales are {tensor.dtype}, where float32 is covered"
        if tensor.dtype == torch.int8:
            return "its weights are FP4"
    if type(layer).__name__ == _EXPERTS and layer.intermediate_dim % BLOCK:
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
    out: torch.Tensor = linear_op(x, here(layer.weight), here(layer.weight_scale_inv), bias)
    return out
