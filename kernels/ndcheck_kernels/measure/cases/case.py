"""A case and the operands it draws."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

LEVELS = 64  # few, so that equal values are sure to compete for an index
Tensors = tuple[torch.Tensor, ...]
Call = Callable[..., torch.Tensor]

MOST_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """Draws tensors of one dtype on one device, the same ones for the same seed."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    @classmethod
    def seeded(cls, dtype: torch.dtype, device: torch.device, seed: int = 0) -> "Source":
        return cls(dtype, device, torch.Generator(device).manual_seed(seed))

    def normal(self, *shape: int) -> torch.Tensor:
        return self._randn(shape).to(self.dtype)

    def wide(self, *shape: int, binades: int = 5) -> torch.Tensor:
        """Normal draws times powers of two: none dominates, and none is small beside all."""
        scale = self._integers(-binades, binades + 1, shape).exp2()
        return (self._randn(shape) * scale).to(self.dtype)

    def cancelling(self, m: int, k: int) -> torch.Tensor:
        """Rows [M, K] that sum to exactly 0."""
        half = self.wide(m, k // 2)
        return torch.cat([half, -half], 1)[:, self.order(k)]

    def running_out(self, m: int, k: int) -> torch.Tensor:
        """Rows [M, K] of which every eight values in a row sum to exactly 0."""
        half = self.wide(m, k // 8, 4, binades=10)  # fewer binades would sum without rounding
        return torch.cat([half, -half], -1)[..., self.order(8)].reshape(m, k)

    def absorbing(self, m: int, k: int, top: float, low: float, high: float) -> torch.Tensor:
        """Rows of one `top`, then values that it absorbs one by one but not their sum."""
        rows = self._rand((m, k)) * (high - low) + low
        rows[:, 0] = top
        return rows.to(self.dtype)

    def levels(self, m: int, k: int) -> torch.Tensor:
        return self._integers(0, LEVELS, (m, k)).to(self.dtype)

    def order(self, k: int) -> torch.Tensor:
        return torch.randperm(k, generator=self.generator, device=self.device)

    def integers(self, *shape: int) -> torch.Tensor:
        """-2 to 2: products of them are exact."""
        return self._integers(-2, 3, shape).to(self.dtype)

    def _randn(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _rand(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _integers(self, low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        drawn = torch.randint(low, high, shape, generator=self.generator, device=self.device)
        return drawn.float()


class FixedSource(Source):
    """Draws the same tensors on every device and under every version of torch.

    A generator's numbers may change with a release. These come from integer arithmetic alone, the
    same everywhere, in the order in which they are asked for.
    """

    __slots__ = ("_taken",)

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        super().__init__(dtype, device, torch.Generator(device))
        object.__setattr__(self, "_taken", [seed << 40])

    def order(self, k: int) -> torch.Tensor:
        return self._bits((k,)).sort(stable=True).indices

    def _randn(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The sum of four bytes about 0: nearly normal, and exact in float32."""
        bits = self._bits(shape)
        total = sum((bits >> shift) & 0xFF for shift in (0, 8, 16, 24))
        return (total - 510).float() / 128  # type: ignore[union-attr]

    def _rand(self, shape: tuple[int, ...]) -> torch.Tensor:
        return (self._bits(shape) >> 8).float() / 2**24

    def _integers(self, low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return (self._bits(shape) % (high - low) + low).float()

    def _bits(self, shape: tuple[int, ...]) -> torch.Tensor:
        """32 mixed bits each, in int64, of running numbers (the finaliser of MurmurHash3)."""
        taken: list[int] = self._taken  # type: ignore[attr-defined]
        n = math.prod(shape)
        bits = torch.arange(taken[0], taken[0] + n, device=self.device)
        taken[0] += n
        bits = (bits ^ (bits >> 32)) & 0xFFFFFFFF
        # Products may overflow; their low 32 bits are right even so.
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
        return (bits ^ (bits >> 16)).reshape(shape)


@dataclass(frozen=True, slots=True)
class Operands:
    """`rows` are [M, ...] each and follow the batch; `fixed` do not."""

    rows: Tensors
    fixed: Tensors = ()

    def first(self, m: int) -> Tensors:
        """The arguments of a call for the first `m` rows."""
        return (*(r[:m] for r in self.rows), *self.fixed)


Draw = Callable[[Source, int, bool], Operands]
"""From a source, the number of rows, and whether noise is wanted rather than wide range."""


Ends = Callable[[Source, int], Iterator[tuple[str, Operands]]]
"""From a source and the number of rows: operands at both ends of the dtype's range, each named."""


def scaled_ends(draw: Draw, terms: int) -> Ends:
    """The rows of `draw` scaled to the ends of the range within which float32 can add `terms` of
    them, and half way there, where their squares reach the ends.
    """

    def ends(source: Source, m: int) -> Iterator[tuple[str, Operands]]:
        drawn = draw(source, m, False)
        largest = max(rows.abs().max().item() for rows in drawn.rows)
        limits, wide = torch.finfo(source.dtype), torch.finfo(torch.float32)
        top = min(limits.max, wide.max / (64 * terms)) / largest
        bottom = max(limits.tiny, 2**24 * wide.tiny) / largest
        for name, factor in (
            ("the largest", top), ("large", top**0.5), ("small", bottom**0.5),
            ("the smallest", bottom),
        ):  # fmt: skip
            rows = tuple((rows.double() * factor).to(source.dtype) for rows in drawn.rows)
            yield f"{name} operands", Operands(rows, drawn.fixed)

    return ends


@dataclass(frozen=True, slots=True)
class Form:
    """Another way to call a case's op: with an argument left out, given, or by another name."""

    name: str
    call: Call
    reference: Call
    fires: str = ""
    """What it counts, where that is not what the case counts."""


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one shape."""

    op: str
    shape: str
    fires: str
    """What `Scope.fires` counts when the op is overridden."""
    operands: Draw
    call: Call
    """Takes rows and fixed operands; the result has the rows in dim 0."""
    reference: Call
    grouped: Call
    """A planted fault: takes a number of groups first, and sums in so many. The float result is the
    same, its bits are not."""
    flops_per_row: int = 0
    """0 where memory is what counts."""
    max_rows: int = MOST_ROWS
    forms: tuple[Form, ...] = ()
    ends: Ends | None = None
    terms: int = 1
    """How many terms an element of the result is a sum of."""


def sum_in_groups(groups: int, x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> [..., 1] in float32, each group of K summed by itself."""
    return sum(  # type: ignore[return-value]
        part.sum(-1, keepdim=True) for part in x.float().chunk(groups, -1)
    )
