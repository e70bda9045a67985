"""Rows in groups times experts in MXFP4, as if their weights were stored plain.

Computes: rows of group e times w[e].T, with w = e2m1 code * 2**(scale - 127) for each 32 columns,
    rounded once to the rows' dtype: bfloat16 and float32 hold it as it is.
Reduction order: that of `aten._grouped_mm` on the device with the plain weights [E, K, N].
Depends on: what that product depends on.
Dtypes: rows as that product has them; blocks and scales uint8.
Not claimed: nothing beyond. A scale of 255 is NaN.

Layout: gpt-oss's checkpoints; numbers: OCP Microscaling Formats 1.0.
"""

from collections.abc import Callable

import torch

from ndcheck_kernels.ops.library import declare
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import implements

BLOCK = 32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# [P, K] x [E, N, K / 32, 16] with scales [E, N, K / 32]: rows up to ends[e] and from the end before
# it go through item e -> [P, N].
grouped_op = declare(
    "mxfp4_grouped(Tensor rows, Tensor blocks, Tensor scales, Tensor ends) -> Tensor"
)

GroupedProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def register_mxfp4(device: str, product: GroupedProduct) -> None:
    """Register the product of rows in groups for a device."""

    @implements(grouped_op, device=device)
    def grouped(
        rows: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
            raise UnsupportedCallError(f"blocks are {blocks.dtype}, scales {scales.dtype}")
        if blocks.shape != (*scales.shape, BLOCK // 2) or rows.shape[1] != BLOCK * blocks.shape[2]:
            raise UnsupportedCallError(
                f"rows of {rows.shape[1]} times blocks {tuple(blocks.shape)} with scales "
                f"{tuple(scales.shape)}"
            )
        return product(rows, blocks, scales, ends)


def dequantise(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """blocks [..., K / 32, 16] and scales [..., K / 32] -> [..., K]; a byte's low half is first."""
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    table = torch.tensor(_VALUES, device=blocks.device)
    values = torch.cat((table, -table))[codes.long()]
    power = scales.int() << 23
    power = torch.where(scales == 0, 1 << 22, power).view(torch.float32)
    power = power.masked_fill(scales == 255, torch.nan)
    return (values * power[..., None]).flatten(-2).to(dtype)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [..., K] -> blocks and scales; a block's largest magnitude becomes 4 to 8, or 6."""
    groups = weight.float().unflatten(-1, (-1, BLOCK))
    exponent = torch.frexp(groups.abs().amax(-1)).exponent - 3
    scales = (exponent + 127).clamp(1, 254)
    wide = groups * torch.exp2((127 - scales).float())[..., None]
    table = torch.tensor(_VALUES, device=weight.device)
    codes = torch.bucketize(wide.abs(), (table[1:] + table[:-1]) / 2) + 8 * (wide < 0)
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales.to(torch.uint8)
