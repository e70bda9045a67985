"""From what a user typed to an explanation on the screen: order, demo, trace, shrink."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import typer

from ndcheck import request
from ndcheck.cli.session import note
from ndcheck.errors import UsageError
from ndcheck.store import replacing, write_failure

MAX_DRAWN_TERMS = 1024


def order(
    op: str | None,
    fn: str | None,
    *,
    rows: str,
    terms: str,
    columns: int,
    dtype: str,
    device: str,
    kernels: str,
    drawings: dict[str, Path | None],
    as_json: bool,
    quiet: bool,
) -> int:
    """Read the orders and show them. Returns the exit code."""
    from ndcheck.explain import order as explain
    from ndcheck.explain import order_report
    from ndcheck.explain.reductions import REDUCTIONS, Shape, load_function
    from ndcheck.samplers.transformers import DTYPES, choose_device

    if (op is None) == (fn is None):
        raise UsageError(f"give one OP ({', '.join(REDUCTIONS)}) or --fn module:function")
    if op is not None and op not in REDUCTIONS:
        raise UsageError(f"OP {op!r} is unknown; choose from {', '.join(REDUCTIONS)}, or use --fn")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    if columns < 1:
        raise UsageError(f"--columns {columns}: give 1 or more")
    row_counts, lengths = _numbers("--rows", rows), _numbers("--terms", terms)
    if lengths[0] < 2:
        raise UsageError("--terms: a sum has 2 terms or more")
    if any(drawings.values()) and lengths[-1] > MAX_DRAWN_TERMS:
        raise UsageError(f"--dot and --svg draw up to {MAX_DRAWN_TERMS} terms: lower --terms")
    (arm,) = request.parse_arms(kernels)[:1]
    if arm != kernels:
        raise UsageError(f"--kernels {kernels}: give one of stock, invariant")
    reduction = load_function(fn) if fn else REDUCTIONS[str(op)]
    shape = Shape(lengths[0], columns, DTYPES[dtype], choose_device(device))
    points = explain.sweep(
        reduction,
        shape,
        [(n_rows, length) for length, n_rows in product(lengths, row_counts)],
        arm,
        lambda point: note(f"{reduction.name}: {point.rows} rows read", quiet=quiet),
    )
    setting = {
        "op": reduction.name,
        "columns": columns,
        "dtype": dtype,
        "device": str(shape.device),
        "kernels": arm,
    }
    _write(drawings, order_report.distinct_orders(points))
    if as_json:
        typer.echo(json.dumps(order_report.order_document(setting, points)))
    else:
        title = f"{reduction.name}, {dtype}, {columns} columns, {shape.device}, {arm} kernels"
        width = shutil.get_terminal_size().columns
        for line in order_report.order_lines(title, reduction.rows, points, width):
            typer.echo(line)
    return int(explain.depends_on_rows(points))


def _write(drawings: dict[str, Path | None], orders: dict[str, Any]) -> None:
    from ndcheck.explain import order_report

    for kind, path in drawings.items():
        if path is not None:
            try:
                with replacing(path) as file:
                    file.write(getattr(order_report, kind)(orders))
            except OSError as error:
                raise write_failure(path, error) from error


def _numbers(option: str, text: str) -> list[int]:
    """``"1-4,8"`` as ascending numbers of 1 or more."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(first) < 1:
            raise UsageError(f"{option}: {part.strip()!r} is not a number or a range such as 1-8")
        numbers.update(range(int(first), int(last or first) + 1))
    if not numbers:
        raise UsageError(f"{option}: {text!r} holds no number")
    return sorted(numbers)
