"""Takes the manifest of this stack: bits, a decode step's repeats, and orders of addition."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING

from ndcheck import environment
from ndcheck.errors import UsageError
from ndcheck.stack.manifests import FORMAT, Entry, Manifest, Order, Point, Step

if TYPE_CHECKING:
    import torch

READ_OPS = ("mm", "linear", "bmm", "sum", "mean", "attention")
READ_TERMS, READ_COLUMNS, READ_ROWS = 64, 16, (1, 2, 16, 64)
STEP_SECONDS = {"cuda": 15.0, "cpu": 5.0}


def take_manifest(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    row_counts: Sequence[int] | None,
    ops: Sequence[str],
    note: Callable[[str], None],
) -> Manifest:
    """The kernels' own cases, no weights. Raises UsageError for an op that has none."""
    from ndcheck_kernels.measure import manifest as measured
    from ndcheck_kernels.measure.cases import manifest_cases
    from ndcheck_kernels.measure.decode_repeats import repeat_steps

    started_s = time.monotonic()
    counts = tuple(row_counts or measured.ROW_COUNTS[device.type])
    repeats = measured.REPEATS[device.type]
    cases = manifest_cases(device.type)
    names = tuple(dict.fromkeys(case.op for case in cases))
    if unknown := [op for op in ops if op not in names]:
        raise UsageError(f"--op {unknown[0]!r}: give all, or some of {', '.join(names)}")
    entries = []
    for case in cases:
        if ops and case.op not in ops:
            continue
        note(f"bits of {case.op} {case.shape}")
        for entry in measured.take_all([case], dtypes, device, counts, repeats):
            points = tuple(Point(**dataclasses.asdict(point)) for point in entry.points)
            fields = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
            entries.append(Entry(**{**fields, "points": points}))
    steps: tuple[Step, ...] = ()
    orders: tuple[Order, ...] = ()
    if not ops:
        note("decode steps, repeated")
        found = repeat_steps(device, dtypes[0], STEP_SECONDS[device.type])
        steps = tuple(Step(**dataclasses.asdict(step)) for step in found)
        note("orders of addition")
        orders = tuple(_orders(device))
    here = environment.capture(model={})
    return Manifest(
        format=FORMAT,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        elapsed_s=round(time.monotonic() - started_s, 1),
        device=device.type,
        dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
        row_counts=counts,
        ops=tuple(ops),
        environment={
            "hardware": here.hardware,
            "software": here.software,
            "numeric_flags": here.numeric_flags,
        },
        packages=installed(),
        entries=tuple(entries),
        steps=steps,
        orders=orders,
    )


def take_like(other: Manifest, note: Callable[[str], None]) -> Manifest:
    """What another manifest holds, measured here. Raises UsageError where it cannot be."""
    import torch

    from ndcheck.samplers.local.device import choose_device
    from ndcheck.samplers.options import DTYPES

    if unknown := [name for name in other.dtypes if name not in DTYPES.values()]:
        raise UsageError(f"the manifest has the dtype {unknown[0]!r}, of which nothing is known")
    device = choose_device(other.device)
    dtypes = [getattr(torch, name) for name in other.dtypes]
    return take_manifest(device, dtypes, other.row_counts, other.ops, note)


def installed() -> dict[str, str]:
    """Every package that this process would import, with its version: of two, the first."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-"), distribution.version)
    return dict(sorted(found.items()))


def _orders(device: torch.device) -> Iterator[Order]:
    import torch

    from ndcheck.explain.order.orders import sweep
    from ndcheck.explain.order.reductions import REDUCTIONS, Shape
    from ndcheck.records import ARMS

    shape = Shape(READ_TERMS, READ_COLUMNS, torch.float32, device)
    points = [(rows, READ_TERMS) for rows in READ_ROWS]
    for op in READ_OPS:
        for arm in ARMS:
            for point in sweep(REDUCTIONS[op], shape, points, arm):
                keys = " | ".join(" ".join(dict.fromkeys(row)) for row in point.row_classes)
                yield Order(op, arm, READ_TERMS, point.rows, keys or "unknown", point.doubt)
