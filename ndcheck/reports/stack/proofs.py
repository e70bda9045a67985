"""What `ndcheck kernels prove` found, for a screen and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ndcheck.judging.verdict import Outcome, count
from ndcheck.reports.terminal import STYLES
from ndcheck.reports.untrusted import visible

if TYPE_CHECKING:
    from ndcheck_kernels.measure.prove import ShapeProof
    from ndcheck_kernels.measure.tune import Cell

MAX_NAMED = 12


@dataclass(frozen=True, slots=True)
class Proven:
    """One shape, and what was tuned of it."""

    proof: ShapeProof
    cells: tuple[Cell, ...]


def judge_proofs(results: Sequence[Proven]) -> Outcome:
    """FAIL where what would have been selected is out of the class."""
    if any(result.proof.selectable_shut_out for result in results):
        return "FAIL"
    doubtful = not results or any(result.proof.control is not None for result in results)
    return "INCONCLUSIVE" if doubtful else "PASS"


def speed_over_frozen(results: Sequence[Proven]) -> float | None:
    """Geometric mean of the frozen tables' time over the tuned ones', over all cells."""
    ratios = [cell.frozen_us / cell.us for result in results for cell in result.cells]
    return statistics.geometric_mean(ratios) if ratios else None


def print_proofs(
    console: Console,
    results: Sequence[Proven],
    environment: Mapping[str, str],
    elapsed_s: float,
    path: str,
) -> None:
    """A line for each shape, what was shut out by name, the tables, and the verdict."""
    table = Table(box=None, pad_edge=False)
    table.add_column("shape", no_wrap=True)
    for name in ("in class", "shut out", "do not fit", "cuBLASLt", "planted"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        proof = result.proof
        same = sum(reason is None for reason in proof.borrowed.values())
        table.add_row(
            visible(str(proof.shape)),
            str(len(proof.classes) - len(proof.shut_out)),
            str(len(proof.shut_out)),
            str(len(proof.untried)),
            f"{same}/{len(proof.borrowed)}",
            "caught" if proof.control is None else "NOT CAUGHT",
        )
    console.print(table)
    for result in results:
        if result.proof.control is not None:
            console.print(Text(f"\n{result.proof.shape}: {result.proof.control}", style="yellow"))
        for label, why in list(result.proof.shut_out.items())[:MAX_NAMED]:
            console.print(Text(f"\nshut out of {result.proof.shape}: {label}: {why}", style="red"))
    _print_cells(console, results)
    outcome = judge_proofs(results)
    tried = sum(len(result.proof.classes) for result in results)
    out = sum(len(result.proof.shut_out) for result in results)
    console.print()
    console.print(
        Text.assemble(
            (outcome, STYLES[outcome]),
            f"  {tried - out} of {tried} configurations of {count(len(results), 'shape')} are in "
            f"their shape's bit class; {elapsed_s:.0f} s",
        )
    )
    console.print(Text(", ".join(f"{name} {visible(v)}" for name, v in environment.items())))
    console.print(Text(f"kept in {visible(path)}, for these versions alone"))


def _print_cells(console: Console, results: Sequence[Proven]) -> None:
    if not any(result.cells for result in results):
        return
    table = Table(box=None, pad_edge=False)
    for name in ("shape", "rows to", "choice"):
        table.add_column(name, no_wrap=name != "choice")
    for name in ("us", "frozen us", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        for cell in result.cells:
            table.add_row(
                f"{result.proof.shape.n}x{result.proof.shape.k}",
                str(cell.max_rows),
                "as frozen" if cell.choice == cell.frozen else cell.choice,
                f"{cell.us:.1f}",
                f"{cell.frozen_us:.1f}",
                f"{cell.frozen_us / cell.us:.2f}",
            )
    console.print()
    console.print(table)
    cells = sum(len(result.cells) for result in results)
    console.print(
        f"\n{speed_over_frozen(results):.3f} times the frozen tables' speed (geometric mean of "
        f"{cells} cells)"
    )


def proof_document(
    results: Sequence[Proven], environment: Mapping[str, str], elapsed_s: float
) -> dict[str, Any]:
    """For --json."""
    return {
        "outcome": judge_proofs(results),
        "elapsed_s": elapsed_s,
        "speed_over_frozen": speed_over_frozen(results),
        "environment": dict(environment),
        "shapes": [
            {**asdict(r.proof), "cells": [asdict(cell) for cell in r.cells]} for r in results
        ],
    }
