"""A case and the operands it draws."""

from collections.abc import Callable
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
        rows = torch.rand(m, k, generator=self.generator, device=self.device) * (high - low) + low
        rows[:, 0] = top
        return rows.to(self.dtype)

    def levels(self, m: int, k: int) -> torch.Tensor:
        return self._integers(0, LEVELS, (m, k)).to(self.dtype)

    def order(self, k: int) -> torch.Tensor:
        return torch.randperm(k, generator=self.generator, device=self.device)

    def _randn(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _integers(self, low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        drawn = torch.randint(low, high, shape, generator=self.generator, device=self.device)
        return drawn.float()


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


def sum_in_groups(groups: int, x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> [..., 1] in float32, each group of K summed by itself."""
    return sum(  # type: ignore[return-value]
        part.sum(-1, keepdim=True) for part in x.float().chunk(groups, -1)
    )
