"""What `ndcheck kernels` found, as tables for a screen and rows for a file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ndcheck.judging.verdict import Outcome
from ndcheck.reports.terminal import STYLES
from ndcheck.samplers.options import SHORT_DTYPES

if TYPE_CHECKING:
    from ndcheck_kernels.measure.bench import Ceilings, Cell
    from ndcheck_kernels.measure.check import Finding

Row = Mapping[str, object]

Item = TypeVar("Item", "Finding", "Cell")

MAX_REASONS = 8


def judge_findings(findings: Sequence[Finding], n_asked: int) -> Outcome:
    """One failure fails; a refusal, an uncaught fault or a missing finding leaves it open."""
    outcomes = {finding.outcome for finding in findings}
    if "FAIL" in outcomes:
        return "FAIL"
    return "PASS" if outcomes == {"PASS"} and len(findings) == n_asked else "INCONCLUSIVE"


def check_rows(finding: Finding) -> Iterator[Row]:
    """One row for each number of rows tried; one without if the op was refused."""
    shared = {
        "op": finding.op,
        "shape": finding.shape,
        "dtype": finding.dtype,
        "kernel": finding.kernel or None,
        "outcome": finding.outcome,
        "classes": finding.classes,
        "stock_classes": finding.stock_classes,
        "control_classes": finding.control_classes,
        "budget": finding.budget,
        "reason": finding.failure or finding.doubt,
    }
    names = ("m", "same_bits", "error", "stock_same_bits", "stock_error")
    for count in finding.row_counts:
        yield shared | dict(zip(names, astuple(count), strict=True))
    if not finding.row_counts:
        yield shared | dict.fromkeys(names)


def bench_row(cell: Cell) -> Row:
    return asdict(cell)


def check_document(findings: Sequence[Finding], n_asked: int) -> dict[str, object]:
    """For --json."""
    return {
        "outcome": judge_findings(findings, n_asked),
        "findings": [
            {**asdict(f), "outcome": f.outcome, "reason": f.failure or f.doubt} for f in findings
        ],
    }


def bench_document(cells: Sequence[Cell], ceilings: Mapping[str, Ceilings]) -> dict[str, object]:
    """For --json."""
    return {
        "ceilings": {dtype: asdict(ceiling) for dtype, ceiling in ceilings.items()},
        "cells": [asdict(cell) for cell in cells],
    }


def print_check(console: Console, findings: Sequence[Finding], n_asked: int, setting: str) -> None:
    """One line for each op, shape and dtype; the verdict last, where a long table ends."""
    table = _table("op", "shape", "dtype")
    for name in ("classes", "stock", "error", "stock", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for finding, op, shape in _without_repeats(findings):
        table.add_row(
            op,
            shape,
            SHORT_DTYPES.get(finding.dtype, finding.dtype),
            _count(finding.classes),
            _count(finding.stock_classes),
            _error(finding.error),
            _error(finding.stock_error),
            _error(finding.budget),
            Text(finding.outcome, style=STYLES[finding.outcome].removeprefix("bold ")),
        )
    console.print(table)
    console.print()
    outcome = judge_findings(findings, n_asked)
    console.print(Text.assemble((outcome, STYLES[outcome]), "  ", _sentence(findings, n_asked)))
    console.print(Text(setting))
    wrong = [f for f in findings if f.outcome == outcome != "PASS"]
    for finding in wrong[:MAX_REASONS]:
        dtype = SHORT_DTYPES.get(finding.dtype, finding.dtype)
        console.print(
            Text(f"\n{finding.op} {finding.shape} {dtype}: {finding.failure or finding.doubt}")
        )
        command = f"  ndcheck kernels check --op {finding.op} --dtype {dtype}"
        console.print(Text(command, style="cyan"))
    if len(wrong) > MAX_REASONS:
        console.print(f"\nand {len(wrong) - MAX_REASONS} more in the table")


def _sentence(findings: Sequence[Finding], n_asked: int) -> str:
    counts = Counter(finding.outcome for finding in findings)
    checked = [f for f in findings if f.stock_classes is not None]
    several = sum((f.stock_classes or 0) > 1 for f in checked)
    return (
        f"{counts['PASS']} of {n_asked} have one bit class, within the error budget; "
        f"stock has several in {several} of {len(checked)}"
    )


def print_bench(
    console: Console, cells: Sequence[Cell], ceilings: Mapping[str, Ceilings], setting: str
) -> None:
    """One line for each cell, then the ceilings and the mean ratio."""
    table = _table("op", "shape", "dtype")
    for name in ("rows", "us", "stock us", "ratio", "TFLOP/s", "GB/s", "ceiling"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell, op, shape in _without_repeats(cells):
        table.add_row(
            op,
            shape,
            SHORT_DTYPES.get(cell.dtype, cell.dtype),
            str(cell.m),
            _three_digits(cell.us),
            _three_digits(cell.stock_us),
            f"{cell.ratio:.2f}",
            "" if cell.tflop_per_s is None else _three_digits(cell.tflop_per_s),
            _three_digits(cell.gb_per_s),
            f"{cell.share_of_ceiling:.0%}",
        )
    console.print(table)
    console.print()
    ratios = [cell.ratio for cell in cells]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        console.print(
            Text.assemble(
                (f"{mean:.2f} times stock's speed", "bold"),
                f" (geometric mean of {len(ratios)} cells, {min(ratios):.2f} to {max(ratios):.2f})",
            ),
        )
    for dtype, ceiling in ceilings.items():
        console.print(
            f"ceilings {SHORT_DTYPES.get(dtype, dtype)}: copy "
            f"{_three_digits(ceiling.copy_gb_per_s)} GB/s, mm "
            f"{_three_digits(ceiling.mm_tflop_per_s)} TFLOP/s",
        )
    console.print(Text(setting))


def _without_repeats(items: Sequence[Item]) -> Iterator[tuple[Item, str, str]]:
    before: tuple[str, str] | None = None
    for item in items:
        here: tuple[str, str] = (item.op, item.shape)
        yield (item, "", "") if here == before else (item, *here)
        before = here


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _three_digits(value: float) -> str:
    """Without an exponent: 0.0123, 1.23, 12.3, 123, 12345."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(digits, 0), 4)}f}"
