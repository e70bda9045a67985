"""The fastest configuration of a bit class by number of rows, as a table.

Only configurations that `prove` found in the class are timed, so that no choice can change bits.
Beside them the frozen table's own choice and, where it was proven, cuBLASLt. What won is then timed
again beside the frozen choice: the first times chose it, so they flatter it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ndcheck_kernels.cuda import candidates, configs, device
from ndcheck_kernels.cuda.configs import MatmulConfig
from ndcheck_kernels.cuda.products import borrowed, matmul
from ndcheck_kernels.measure.prove import ShapeProof
from ndcheck_kernels.measure.timing import Launches, copies, medians_us

BUCKETS = (1, 16, 32, 64, 128, 256, 512, 1024, 8192)
"""Up to which number of rows a choice serves; each is timed at it."""
BORROWED = "cuBLASLt"
GAIN = 0.98
"""Of the frozen choice's time: what another has to stay below, or noise would choose."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One choice: `us` and `frozen_us` are of the second, unbiased timing."""

    max_rows: int
    choice: str
    """A label, or cuBLASLt; `config` is what serves where that cannot."""
    config: str
    frozen: str
    us: float
    frozen_us: float

    @property
    def row(self) -> dict[str, Any]:
        """As a table of `proofs` has it."""
        borrows = self.choice == BORROWED
        return {"max_rows": self.max_rows, "config": self.config, "borrows": borrows}


def tune(
    proof: ShapeProof, where: torch.device, buckets: Sequence[int] = BUCKETS
) -> Iterator[Cell]:
    """A cell for each bucket up to the most rows that the proof has."""
    shape = proof.shape
    dtype = getattr(torch, shape.dtype)
    in_class = {label for label, why in proof.classes.items() if why is None}
    most = min(max(buckets), max(proof.rows))
    count = copies(2 * shape.n * shape.k, where.type)
    weights = [torch.randn(shape.n, shape.k, device=where).to(dtype) for _ in range(count)]
    tokens = torch.randn(most, shape.k, device=where).to(dtype)
    for m in sorted({min(bucket, most) for bucket in buckets}):
        x = tokens[:m]
        tried = [v for c in candidates.candidates(m) for v in candidates.variants(c, shape.groups)]
        tried.append(configs.pointer_config(m, 2, max(configs.PROVEN)))
        fitting = [config for config in tried if config.label in in_class]
        frozen_config, frozen = _frozen(proof, m, where)
        launches = {
            config.label: _launches(x, weights, config, shape.groups)
            for config in dict.fromkeys([frozen_config, *fitting])
        }
        if proof.borrowed.get(m, "") is None:
            launches[BORROWED] = [partial(_borrow, x, w, shape.groups) for w in weights]
        times = medians_us(launches, where.type)
        choice = min(times, key=lambda name: times[name])
        if choice != frozen and not times[choice] < GAIN * times[frozen]:
            choice = frozen
        ours = min((name for name in times if name != BORROWED), key=lambda name: times[name])
        again = {"choice": launches[choice], "frozen": launches[frozen]}
        seen = medians_us(again, where.type)
        if choice == frozen:
            seen = dict.fromkeys(again, statistics.median(seen.values()))
        yield Cell(m, choice, ours, frozen, seen["choice"], seen["frozen"])


def _frozen(proof: ShapeProof, m: int, where: torch.device) -> tuple[MatmulConfig, str]:
    """What the frozen tables choose, as far as it is in the class: a configuration, and a name."""
    shape = proof.shape
    capability = device.capability(where)
    config = configs.matmul_config(m, shape.n, shape.k, 2, capability)
    if proof.classes.get(config.label, "") is not None:
        config = configs.ONE_FOR_ALL
    borrows = configs.borrows(m, shape.n, shape.k, 2, capability)
    is_borrowed = borrows and proof.borrowed.get(m, "") is None
    return config, BORROWED if is_borrowed else config.label


def _launches(
    x: torch.Tensor, weights: Sequence[torch.Tensor], config: MatmulConfig, groups: int
) -> Launches:
    return [
        partial(matmul._launch, x, w.t(), None, 1.0, 1.0, None, config, groups) for w in weights
    ]


def _borrow(x: torch.Tensor, w: torch.Tensor, groups: int) -> torch.Tensor:
    return borrowed.product(x, w, x.new_empty(len(x), len(w)), None, groups)


def geometric_mean(cells: Sequence[Cell]) -> float:
    """Of the frozen choice's time over the tuned one's: above 1 is faster than frozen."""
    return statistics.geometric_mean([cell.frozen_us / cell.us for cell in cells])
