"""The bits of every op on this stack: what changes when a version, a driver or a card does.

Operands are the same everywhere (`FixedSource`), and their results little but rounding, so that
another order of summation is another digest. For each op, shape, dtype and arm the same rows are
computed in batches of every size. Equal digests are one *bit class*; where the digest changes from
one number of rows to the next is a class boundary. Each call is repeated in the stream without
waiting for it, so that a result that depends on what else runs can show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ndcheck_kernels.measure.cases import Case, FixedSource, Operands
from ndcheck_kernels.scope.mode import invariant_kernels
from ndcheck_kernels.scope.refusal import UncoveredOpError

PROBES = 16
ROW_COUNTS = {
    "cuda": (1, 2, 3, 4, 8, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 2048),
    "cpu": (1, 2, 3, 4, 8, 16, 17, 32, 33, 64, 65, 128),
}
REPEATS = {"cuda": 8, "cpu": 2}
ARMS = ("stock", "invariant")


@dataclass(frozen=True, slots=True)
class Point:
    """One number of rows.

    `bits` is a digest of the probe rows' results; `is_uniform`: all copies of a probe in the batch
    have the same; `differing` of the repeats had other bits than the first call.
    """

    m: int
    bits: str
    is_uniform: bool
    differing: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One op at one shape, in one dtype and arm. A refused op has nothing but its refusal."""

    op: str
    shape: str
    dtype: str
    arm: str
    operands: str = ""
    """A digest: bits can be compared only where the operands are the same."""
    shows_order: bool = False
    """The control: the same op summed in three groups of terms instead of one has other bits."""
    repeats: int = 0
    points: tuple[Point, ...] = ()
    refusal: str = ""


def take(
    case: Case, dtype: torch.dtype, device: torch.device, arm: str, row_counts: Sequence[int],
    repeats: int,
) -> Entry:  # fmt: skip
    """Measure one op in one arm. Row counts above the case's limit are left out."""
    operands = case.operands(FixedSource(dtype, device), PROBES, True)
    counts = [m for m in row_counts if m <= case.max_rows] or [case.max_rows]
    named = (case.op, case.shape, str(dtype).removeprefix("torch."), arm)
    try:
        with torch.inference_mode(), invariant_kernels() if arm == "invariant" else nullcontext():
            points = tuple(_point(case, operands, m, repeats) for m in counts)
            one, three = (case.grouped(n, *operands.first(PROBES)) for n in (1, 3))
    except UncoveredOpError as error:
        return Entry(*named, refusal=str(error).partition("\n")[0])
    digest = _digest(*operands.rows, *operands.fixed)
    shows_order = not torch.equal(one, three)
    return Entry(*named, digest, shows_order, repeats, points)


def _point(case: Case, operands: Operands, m: int, repeats: int) -> Point:
    seen: dict[int, torch.Tensor] = {}
    is_uniform = True
    differing: list[torch.Tensor] = []
    turn = torch.arange(m, device=operands.rows[0].device)
    for start in range(0, PROBES, m):
        index = (start + turn) % PROBES
        rows = tuple(each[index] for each in operands.rows)
        got = _bytes(case, rows, operands)
        for i, probe in enumerate(index[:PROBES].tolist()):
            is_uniform &= torch.equal(got[i], seen.setdefault(probe, got[i]))
        if m > PROBES:
            is_uniform &= torch.equal(got, got[:PROBES][turn % PROBES])
        again = [_bytes(case, rows, operands) for _ in range(repeats - 1)]
        differing += [(each != got).any() for each in again]
    bits = _digest(*(seen[probe] for probe in range(PROBES)))
    return Point(m, bits, is_uniform, sum(bool(each) for each in differing))


def _bytes(case: Case, rows: Sequence[torch.Tensor], operands: Operands) -> torch.Tensor:
    result = case.call(*rows, *operands.fixed)
    return result.reshape(len(rows[0]), -1).contiguous().view(torch.uint8)


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def take_all(
    cases: Sequence[Case], dtypes: Sequence[torch.dtype], device: torch.device,
    row_counts: Sequence[int], repeats: int,
) -> Iterator[Entry]:  # fmt: skip
    """Every case in every dtype, in both arms."""
    for case in cases:
        for dtype in dtypes:
            for arm in ARMS:
                yield take(case, dtype, device, arm, row_counts, repeats)
