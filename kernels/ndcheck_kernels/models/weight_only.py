"""A linear layer whose weight is kept as integers of 4 or 8 bits.

In a scope it is `ops.weight_only`, whose bits are those of the layer with the dequantised weight;
outside of one, torch's `linear` with that weight, which is made anew for each product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ndcheck_kernels.ops.weight_only import (
    HALF,
    RUN,
    Packed,
    dequantise,
    linear_op,
    quantise,
)
from ndcheck_kernels.scope.state import active_scope


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
        width = k if bits == 8 else -(-k // RUN) * HALF
        groups = (k // group_size, n)
        packed = Packed(
            torch.empty(n, width, dtype=torch.uint8, device=device),
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
