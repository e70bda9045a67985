"""`ndcheck kernels` from options to exit code: validate -> open outputs -> measure -> show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer
from rich.console import Console
from rich.progress import track

from ndcheck import environment
from ndcheck.cli.console import EXIT_CODES
from ndcheck.cli.kernels_checks import check_all, choose_processes
from ndcheck.errors import BackendError, UsageError
from ndcheck.reports import kernels as report
from ndcheck.reports.write import TableFile
from ndcheck.samplers.local.device import choose_device
from ndcheck.samplers.options import DTYPES, short_dtype

if TYPE_CHECKING:
    import torch

    from ndcheck_kernels.measure.cases import Case

MOST_ROWS = 1 << 16
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Selection:
    """What to measure, validated but for the ops, which differ between check and bench."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    ops: tuple[str, ...]
    row_counts: tuple[int, ...] | None


def read_selection(device: str, dtype: str, op: str, rows: str | None) -> Selection:
    """Raises UsageError."""
    import torch

    names = tuple(map(short_dtype, _split(dtype)))
    unknown = [name for name in names if name not in DTYPES]
    if unknown or not names:
        raise UsageError(f"--dtype {dtype!r}: give some of {', '.join(DTYPES)}")
    row_counts = None if rows is None else tuple(sorted({_count(text) for text in _split(rows)}))
    if row_counts == ():
        raise UsageError("--rows: give numbers of rows, such as 1,16,256")
    return Selection(
        choose_device(device),
        tuple(getattr(torch, DTYPES[name]) for name in names),
        () if op == "all" else _split(op),
        row_counts,
    )


def run_check(wanted: Selection, csv: Path | None, *, as_json: bool, quiet: bool) -> int:
    """Measure bits and accuracy. Returns the exit code."""
    from ndcheck_kernels.measure.cases import checked_cases
    from ndcheck_kernels.measure.check import Finding, default_row_counts

    device = wanted.device
    cases = checked_cases(device.type)
    row_counts = wanted.row_counts or default_row_counts(device.type)
    places = [cases.index(case) for case in _select(cases, wanted)]
    work = [(place, dtype) for place in places for dtype in wanted.dtypes]
    n_processes = choose_processes(device, len(work))
    found = check_all(work, device, row_counts, n_processes)
    findings: list[Finding] = []
    with TableFile(csv) as table, closing(found):
        try:
            for finding in _tracked(found, len(work), "checking", quiet=quiet):
                findings.append(finding)
                table.add(report.check_rows(finding))
        finally:  # an interrupt shows what there is
            if as_json:
                _print_json(report.check_document(findings, len(work)))
            elif findings:
                report.print_check(_console(), findings, len(work), _setting(device))
    return EXIT_CODES[report.judge_findings(findings, len(work))]


def run_bench(wanted: Selection, csv: Path | None, *, as_json: bool, quiet: bool) -> int:
    """Measure time. Returns the exit code. Raises BackendError if torch's kernel ran in our arm."""
    from ndcheck_kernels import UncoveredOpError
    from ndcheck_kernels.measure.bench import (
        DEFAULT_ROW_COUNTS,
        Ceilings,
        Cell,
        OverrideMissedError,
        ceilings,
        time_case,
    )
    from ndcheck_kernels.measure.cases import timed_cases

    device = wanted.device
    cases = _select(timed_cases(device.type), wanted)
    row_counts = wanted.row_counts or DEFAULT_ROW_COUNTS[device.type]
    found: dict[str, Ceilings] = {}
    cells: list[Cell] = []
    work = [(case, dtype) for case in cases for dtype in wanted.dtypes]
    with TableFile(csv) as table:
        try:
            for case, dtype in _tracked(work, len(work), "timing", quiet=quiet):
                name = str(dtype).removeprefix("torch.")
                found[name] = found.get(name) or ceilings(device.type, dtype)
                for cell in time_case(case, dtype, device, row_counts, found[name]):
                    cells.append(cell)
                    table.add([report.bench_row(cell)])
        except (OverrideMissedError, UncoveredOpError) as error:
            raise BackendError(str(error)) from error
        finally:
            if as_json:
                _print_json(report.bench_document(cells, found))
            elif cells:
                report.print_bench(_console(), cells, found, _setting(device))
    if not cells:
        raise UsageError(f"--rows: no op takes {min(row_counts)} rows or more")
    return 0


def _select(cases: Sequence[Case], wanted: Selection) -> list[Case]:
    """The cases asked for that this device covers. Raises UsageError."""
    from ndcheck_kernels import covered_ops

    covered = covered_ops(wanted.device.type)
    there = [case for case in cases if case.fires in covered]
    if not there:
        raise UsageError(f"--device {wanted.device}: there are kernels for cpu and cuda")
    names = list(dict.fromkeys(case.op for case in there))
    unknown = [op for op in wanted.ops if op not in names]
    if unknown:
        raise UsageError(
            f"--op {unknown[0]!r}: on {wanted.device.type} give all, or some of {', '.join(names)}"
        )
    return [case for case in there if not wanted.ops or case.op in wanted.ops]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST_ROWS:
        raise UsageError(f"--rows {text!r}: give numbers from 1 to {MOST_ROWS}, such as 1,16,256")
    return int(text)


def _tracked(items: Iterable[T], n_items: int, what: str, *, quiet: bool) -> Iterable[T]:
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    return track(items, what, n_items, console=console, transient=True, disable=hidden)


def _console() -> Console:
    return Console(highlight=False)


def _setting(device: torch.device) -> str:
    here = environment.capture(model={})
    name = here.hardware["gpu"] if device.type == "cuda" else here.hardware["cpu"]
    setting = f"{device}, {name}, torch {here.software['torch']}"
    if device.type == "cuda":
        from ndcheck_kernels.cuda.products.proofs import summary

        setting += f"\nproducts: {summary(device)}"
    return setting


def _print_json(document: dict[str, object]) -> None:
    typer.echo(json.dumps(document, indent=2))
