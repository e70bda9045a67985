"""How fast is an op in the scope, beside the same call outside it and beside the device's ceiling?

Both arms run the same torch call on the same operands in turn (`timing`). The bound of an op is the
time in which the device could move its bytes (each operand read once, each result written once), at
the bandwidth of a copy, or do its arithmetic, at the speed of a square product: the longer of both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from ndcheck_kernels.measure.cases import Case, Operands, Source
from ndcheck_kernels.measure.timing import copies, copy_gb_per_s, medians_us, mm_tflop_per_s
from ndcheck_kernels.scope.mode import invariant_kernels
from ndcheck_kernels.scope.registry import accepted_ops

DEFAULT_ROW_COUNTS = {"cuda": (1, 4, 16, 64, 256, 1024, 4096), "cpu": (1, 4, 16, 64, 256)}


class OverrideMissedError(RuntimeError):
    """An op was to be timed in the scope, but torch's own kernel ran: stock beside stock."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reaches, measured here."""

    copy_gb_per_s: float
    mm_tflop_per_s: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One op at one shape, dtype and number of rows. Ratio is torch's time over ours."""

    op: str
    shape: str
    dtype: str
    m: int
    us: float
    stock_us: float
    ratio: float
    tflop_per_s: float | None
    gb_per_s: float
    bound: Literal["memory", "compute"]
    share_of_ceiling: float


def ceilings(device_type: str, dtype: torch.dtype) -> Ceilings:
    return Ceilings(copy_gb_per_s(device_type), mm_tflop_per_s(device_type, dtype))


def time_case(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    row_counts: Sequence[int],
    ceiling: Ceilings,
) -> Iterator[Cell]:
    """A cell for each number of rows that the case allows. Raises OverrideMissedError."""
    for m in row_counts:
        if m > case.max_rows:
            continue
        operands = case.operands(Source.seeded(dtype, device), m, False)
        with invariant_kernels() as scope:
            result = case.call(*operands.first(m))
        if not scope.fires[case.fires] and case.fires not in accepted_ops(device.type):
            raise OverrideMissedError(f"{case.op} ran torch's own kernel in the invariant scope")
        n_bytes = sum(t.numel() * t.element_size() for t in (*operands.first(m), result))
        launches = [
            partial(case.call, *rotated.first(m))
            for rotated in _rotation(operands, copies(n_bytes, device.type))
        ]
        times = medians_us(
            {"ours": launches, "stock": launches},
            device.type,
            scopes={"ours": invariant_kernels},
        )
        yield _cell(case, dtype, m, times["ours"], times["stock"], n_bytes, ceiling)


def _rotation(operands: Operands, count: int) -> Iterator[Operands]:
    yield operands
    for _ in range(count - 1):
        rows, fixed = (tuple(t.clone() for t in part) for part in (operands.rows, operands.fixed))
        yield Operands(rows, fixed)


def _cell(
    case: Case,
    dtype: torch.dtype,
    m: int,
    us: float,
    stock_us: float,
    n_bytes: int,
    ceiling: Ceilings,
) -> Cell:
    flops = m * case.flops_per_row
    memory_us = n_bytes / ceiling.copy_gb_per_s / 1e3
    compute_us = flops / ceiling.mm_tflop_per_s / 1e6
    return Cell(
        op=case.op,
        shape=case.shape,
        dtype=str(dtype).removeprefix("torch."),
        m=m,
        us=us,
        stock_us=stock_us,
        ratio=stock_us / us,
        tflop_per_s=flops / us / 1e6 if flops else None,
        gb_per_s=n_bytes / us / 1e3,
        bound="memory" if memory_us >= compute_us else "compute",
        share_of_ceiling=max(memory_us, compute_us) / us,
    )
