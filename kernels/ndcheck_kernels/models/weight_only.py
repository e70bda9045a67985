"""Layers whose weights are kept packed: a linear one of integers, and experts in MXFP4.

In a scope they are `ops.weight_only` and `ops.mxfp4`, whose bits are those of plain weights;
outside of one, what torch and transformers do with plain weights, made anew for each product.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ndcheck_kernels.ops import mxfp4
from ndcheck_kernels.ops.weight_only import (
    Packed,
    dequantise,
    linear_op,
    quantise,
    stored_width,
)
from ndcheck_kernels.scope.state import active_scope

_STACKED = ("gate_up_proj", "down_proj")


def is_packed(module: torch.nn.Module) -> bool:
    """Is it a layer of this module's?"""
    return isinstance(module, WeightOnlyLinear) or f"{_STACKED[0]}_blocks" in module._parameters


def draw(module: torch.nn.Module, std: float) -> None:
    """Fill a layer of this module's with quantised normal numbers, and its biases with 0."""
    if isinstance(module, WeightOnlyLinear):
        module.draw(std)
        return
    for name, parameter in module.named_parameters(recurse=False):
        if name.endswith("_blocks"):
            scales = module.get_parameter(name.replace("_blocks", "_scales"))
            for expert, own in zip(parameter.data, scales.data, strict=True):
                wide = torch.randn(*own.shape[:-1], 32 * own.shape[-1], device=own.device) * std
                for stored, drawn in zip((expert, own), mxfp4.quantise(wide), strict=True):
                    stored.copy_(drawn)
        elif not name.endswith("_scales"):
            parameter.data.zero_()


class WeightOnlyLinear(torch.nn.Module):
    """x @ w.T + bias, with the weight as a `Packed`."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_of: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, packed: Packed, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.columns, len(packed.codes)
        self.bits = packed.bits
        for name, tensor in (
            ("codes", packed.codes), ("scales", packed.scales), ("zeros", packed.zeros),
            ("group_of", packed.group_of), ("bias", bias),
        ):  # fmt: skip
            kept = None if tensor is None else torch.nn.Parameter(tensor.detach(), False)
            self.register_parameter(name, kept)

    @classmethod
    def empty(
        cls, like: torch.nn.Linear, bits: int, group_size: int, *, is_symmetric: bool
    ) -> WeightOnlyLinear:
        """A layer for weights of the size of ``like``, on its device, with any numbers."""
        device, (n, k) = like.weight.device, like.weight.shape
        groups = (k // group_size, n)
        packed = Packed(
            torch.empty(n, stored_width(k, bits), dtype=torch.uint8, device=device),
            torch.empty(groups, dtype=like.weight.dtype, device=device),
            None if is_symmetric else torch.empty(groups, dtype=torch.int16, device=device),
            None, bits, k,
        )  # fmt: skip
        return cls(packed, None if like.bias is None else like.bias.detach())

    @property
    def packed(self) -> Packed:
        return Packed(
            self.codes, self.scales, self.zeros, self.group_of, self.bits, self.in_features
        )

    def draw(self, std: float) -> None:
        """Fill it with quantised normal numbers, and its bias with 0."""
        wide = torch.randn(self.out_features, self.in_features, device=self.codes.device) * std
        drawn = quantise(wide, self.bits, self.packed.group_size, is_symmetric=self.zeros is None)
        self.codes.data.copy_(drawn.codes)
        self.scales.data.copy_(drawn.scales)
        if self.zeros is not None and drawn.zeros is not None:
            self.zeros.data.copy_(drawn.zeros)
        if self.bias is not None:
            self.bias.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        if active_scope() is None:
            return F.linear(x, dequantise(self.packed, x.dtype), self.bias)
        out: torch.Tensor = linear_op(
            x, self.codes, self.scales, self.zeros, self.group_of, self.bits, self.bias
        )
        return out


def pack_experts(layer: Any) -> None:
    """Give stacked experts of transformers' blocks and scales in the place of plain weights.

    The layer is one of plain weights [E, K, N]. It keeps its forward, for which a weight is made
    plain each time, all of a layer's experts at once. Raises ValueError where K is no whole blocks.
    """
    shapes = {name: getattr(layer, name).shape for name in _STACKED}
    device = getattr(layer, _STACKED[0]).device
    for name, (experts, k, n) in shapes.items():
        if k % mxfp4.BLOCK:
            raise ValueError(f"{name} of {k} columns is no whole blocks of {mxfp4.BLOCK}")
        delattr(layer, name)
        scales = torch.empty(experts, n, k // mxfp4.BLOCK, dtype=torch.uint8, device=device)
        blocks = torch.empty(*scales.shape, mxfp4.BLOCK // 2, dtype=torch.uint8, device=device)
        for kind, tensor in (("blocks", blocks), ("scales", scales)):
            layer.register_parameter(f"{name}_{kind}", torch.nn.Parameter(tensor, False))
    own = type(layer)
    plain = {name: property(partial(_plain, name=name)) for name in _STACKED}
    layer.__class__ = type(own.__name__, (own,), plain)


def _plain(layer: Any, name: str) -> torch.Tensor:
    """[E, K, N] as transformers dequantises it."""
    blocks, scales = getattr(layer, f"{name}_blocks"), getattr(layer, f"{name}_scales")
    dtype = getattr(layer, f"{name}_bias").dtype
    return mxfp4.dequantise(blocks, scales, dtype).transpose(1, 2).contiguous()
