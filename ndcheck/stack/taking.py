"""Takes the manifest of this stack: bits, a decode step's repeats, and orders of addition."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING

from ndcheck import environment
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
    note: Callable[[str], None],
) -> Manifest:
    """Everything in seconds: the kernels' own cases, no weights."""
    from ndcheck_kernels.measure import manifest as measured
    from ndcheck_kernels.measure.cases import manifest_cases
    from ndcheck_kernels.measure.decode_repeats import repeat_steps

    started_s = time.monotonic()
    counts = tuple(row_counts or measured.ROW_COUNTS[device.type])
    repeats = measured.REPEATS[device.type]
    entries = []
    for case in manifest_cases(device.type):
        note(f"bits of {case.op} {case.shape}")
        for entry in measured.take_all([case], dtypes, device, counts, repeats):
            points = tuple(Point(**dataclasses.asdict(point)) for point in entry.points)
            fields = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
            entries.append(Entry(**{**fields, "points": points}))
    note("decode steps, repeated")
    steps = tuple(
        Step(**dataclasses.asdict(step))
        for step in repeat_steps(device, dtypes[0], STEP_SECONDS[device.type])
    )
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
