"""Rows times weights that are stored as integers of 4 or 8 bits, as if they were stored plain.

Computes: x @ w.T + bias, with w = (code - zero) * scale, multiplied in float32 and rounded once to
    the rows' dtype. That is the dequantised weight of the formats that are converted to this one.
Reduction order: that of torch's `linear` on the device at the same (K, N), in every bit: weights
    are dequantised before they are multiplied, and the rows stay as they are.
Depends on: what that product depends on.
Dtypes: rows as that product has them; codes uint8; scales bfloat16, float16 or float32; zeros
    int16.
Not claimed: that float32 scales are rounded once: their product with a code takes more bits than
    float32 has, so it is rounded there first, as torch does.

A group is a run of columns of one row that share a scale and a zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ndcheck_kernels.ops.library import declare
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import implements

RUN_BYTES = 32
"""Codes lie in runs of so many bytes, each in the order in which a tensor core reads its columns.

Column k of a run is, by its bits from the highest, (h, s, u, q1, q0, e), without s for 8 bits. Its
code is in the 32-bit word (q1, q0, h) of the run, there at place (e, s, u) from the lowest: a lane
of a tensor core's operand holds columns 2 q and 2 q + 1, and those 8 on, for every 16. Filled up
with zeros to whole runs.
"""
BITS = (4, 8)
_SCALES = (torch.bfloat16, torch.float16, torch.float32)

# [..., K] x [N, K]^T + [N] -> [..., N], of the rows' dtype.
linear_op = declare(
    "weight_only_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? group_of, "
    "int bits, Tensor? bias=None) -> Tensor"
)


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [N, K] of integers with a scale a group."""

    codes: torch.Tensor
    """uint8, [N, `stored_width(K, bits)`], as `pack` lays them out."""
    scales: torch.Tensor
    """[G, N]."""
    zeros: torch.Tensor | None
    """[G, N] int16, 0 to 2**bits; None where all are the middle of the codes, 2**(bits - 1)."""
    group_of: torch.Tensor | None
    """[K] int32, each column's group; None where groups are runs of K / G columns."""
    bits: int
    columns: int
    """K."""

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def group_size(self) -> int:
        return self.columns // len(self.scales)

    def check(self) -> None:
        """Raises UnsupportedCallError for other dtypes or sizes than this module's."""
        if self.bits not in BITS or self.codes.dtype != torch.uint8:
            raise UnsupportedCallError(f"codes of {self.bits} bits in {self.codes.dtype}")
        if self.scales.dtype not in _SCALES:
            raise UnsupportedCallError(f"scales are {self.scales.dtype}")
        if self.zeros is not None and (
            self.zeros.dtype != torch.int16 or self.zeros.shape != self.scales.shape
        ):
            raise UnsupportedCallError(
                f"zeros {tuple(self.zeros.shape)} of {self.zeros.dtype} with scales "
                f"{tuple(self.scales.shape)}"
            )
        n, width = self.codes.shape
        n_groups, by_row = self.scales.shape
        is_even = self.group_of is not None or (n_groups and self.columns % n_groups == 0)
        if width != stored_width(self.columns, self.bits) or by_row != n or not is_even:
            raise UnsupportedCallError(
                f"codes {tuple(self.codes.shape)} with scales {tuple(self.scales.shape)} for "
                f"{self.columns} columns"
            )
        if self.group_of is not None and self.group_of.shape != (self.columns,):
            raise UnsupportedCallError(f"groups of {tuple(self.group_of.shape)} columns")


def stored_width(columns: int, bits: int) -> int:
    """Bytes of a row of so many codes."""
    return -(-columns * bits // (8 * RUN_BYTES)) * RUN_BYTES


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes [N, K] below 2**bits -> uint8, [N, `stored_width(K, bits)`]."""
    missing = stored_width(codes.shape[1], bits) * 8 // bits - codes.shape[1]
    runs = torch.nn.functional.pad(codes.to(torch.uint8), (0, missing))
    stored = runs.view(len(codes), -1, 2, 8 // bits, 2, 4, 2).permute(0, 1, 5, 2, 6, 3, 4)
    if bits == 4:
        stored = stored[..., 0] | stored[..., 1] << 4
    return stored.flatten(1).contiguous()


def unpack(packed: Packed) -> torch.Tensor:
    """The codes, uint8 [N, K]."""
    codes = packed.codes
    if packed.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1)
    runs = codes.view(len(codes), -1, 4, 2, 2, 8 // packed.bits, 2).permute(0, 1, 3, 5, 6, 2, 4)
    return runs.flatten(1)[:, : packed.columns]


def dequantise(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] as this module's docstring has it, by torch's ops."""
    codes = unpack(packed).float()
    zeros = None if packed.zeros is None else packed.zeros.t().float()
    scales = packed.scales.t().float()
    if packed.group_of is not None:
        index = packed.group_of.long()
        wide = codes - (packed.middle if zeros is None else zeros[:, index])
        return (wide * scales[:, index]).to(dtype)
    grouped = codes.view(*scales.shape, -1)
    grouped = grouped - (packed.middle if zeros is None else zeros[..., None])
    return (grouped * scales[..., None]).to(dtype).flatten(1)


def quantise(weight: torch.Tensor, bits: int, group_size: int, *, is_symmetric: bool) -> Packed:
    """weight [N, K] -> its codes, with float32 scales of groups of ``group_size`` columns.

    Symmetric, a group's largest magnitude becomes 2**(bits - 1) - 1 above the middle; else its
    range, with 0 in it, takes all codes.
    """
    n, columns = weight.shape
    groups = weight.float().view(n, -1, group_size)
    middle, largest = 1 << (bits - 1), (1 << bits) - 1
    tiny = torch.finfo(torch.float32).tiny
    if is_symmetric:
        scales = (groups.abs().amax(-1) / (middle - 1)).clamp(min=tiny)
        zeros = torch.full_like(scales, middle)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / largest).clamp(min=tiny)
        zeros = (-low / scales).round().clamp(0, largest)
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, largest)
    return Packed(
        pack(codes.view(n, columns), bits), scales.t().contiguous(),
        None if is_symmetric else zeros.t().to(torch.int16).contiguous(), None, bits, columns,
    )  # fmt: skip


Product = Callable[[torch.Tensor, Packed, torch.Tensor | None], torch.Tensor]


def register_weight_only(device: str, product: Product) -> None:
    """Register ``product``, of rows [M, K] -> [M, N], for a device."""

    @implements(linear_op, device=device)
    def linear(
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        group_of: torch.Tensor | None,
        bits: int,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        packed = Packed(codes, scales, zeros, group_of, bits, x.shape[-1])
        packed.check()
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return product(rows, packed, bias).view(*x.shape[:-1], len(codes))
