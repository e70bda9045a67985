"""Find the probe's own part of a batch's tensor: what the same tensor holds when it runs alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Place = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes that tell a tensor's dimensions apart, in the run alone and in the load.

    ``queries`` are the columns of this forward pass, ``width`` those of the static cache and of the
    mask; each as (alone, loaded). ``pad`` is the probe's left padding in the load.
    """

    batch_size: int
    pad: int
    queries: tuple[int, int]
    width: tuple[int, int]
    column: int | None = None
    """Of the load's pass, the first that the pass alone has too; None: after the padding."""
    kept: tuple[int, int] | None = None
    """Of how many last columns the load's pass gives logits, and which of these is the probe's."""

    @property
    def first_column(self) -> int:
        return self.pad if self.column is None else self.column

    def place(self, alone: Sequence[int], loaded: Sequence[int], slot: int) -> Place | None:
        """The part of a loaded tensor that belongs to the probe at ``slot``; None if unclear."""
        if len(alone) != len(loaded):
            return None
        place = []
        is_batched = False
        for a, b in zip(alone, loaded, strict=True):
            if a == b:
                start, length = 0, a
            elif a == 1 and b == self.batch_size and not is_batched:
                start, length, is_batched = slot, 1, True
            elif (a, b) == self.queries:
                start, length = self.first_column, a
            elif (a, b) == self.width:
                start, length = self.pad, a
            elif a == self.queries[0] and b == self.batch_size * self.queries[1]:
                start, length = slot * self.queries[1] + self.first_column, a
            elif self.kept is not None and a == 1 and b == self.kept[0]:
                start, length = self.kept[1], a
            elif self.kept is not None and a == 1 and b == self.batch_size * self.kept[0]:
                start, length = slot * self.kept[0] + self.kept[1], a
            elif b == self.batch_size * a and not is_batched:
                start, length, is_batched = slot * a, a, True
            else:
                return None
            place.append(slice(start, start + length))
        return tuple(place)


def clone_exactly(tensor: Tensor) -> Tensor:
    """A copy with the same strides and the same place within a cache line: kernels look at both."""
    if tensor.numel() == 0 or tensor.layout != torch.strided:
        return tensor.clone()
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    line = 64 // tensor.element_size()
    buffer = torch.empty(extent + line, dtype=tensor.dtype, device=tensor.device)
    offset = (tensor.data_ptr() - buffer.data_ptr()) % 64 // tensor.element_size()
    copy = buffer.as_strided(tensor.shape, tensor.stride(), offset)
    # Dimensions of stride 0 repeat one element: writing it once is enough, and all that is allowed.
    own = tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())
    copy[own] = tensor[own]
    return copy


def write_exactly(target: Tensor, place: Place, values: Tensor) -> bool:
    """Write a part of ``target``; False where it repeats one element that ``values`` does not."""
    for size, stride, repeats in zip(values.shape, values.stride(), target.stride(), strict=True):
        if repeats == 0 and stride != 0 and size > 1:
            return False
    once = tuple(slice(0, 1) if s == 0 else slice(None) for s in target.stride())
    target[place][once] = values[once]
    return True


def as_bytes(tensor: Tensor) -> Tensor:
    """The bits of a dense tensor, uint8 [bytes]; of a contiguous one the same memory."""
    dense = tensor.contiguous()
    # A single element is contiguous whatever its stride, which no view as bytes may have.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of bit patterns: NaN equals itself, and +0 is not -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(as_bytes(a), as_bytes(b))


def max_ulp(a: Tensor, b: Tensor) -> int:
    """The largest distance between two tensors of one float dtype, in units in the last place."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    steps = []
    for tensor in (a, b):
        bits = tensor.contiguous().view(integers).to(torch.int64)
        lowest = torch.iinfo(integers).min
        # Floats order like sign and magnitude: fold the negative half over.
        steps.append(torch.where(bits < 0, lowest - bits, bits))
    return int((steps[0] - steps[1]).abs().max()) if a.numel() else 0
