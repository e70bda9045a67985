"""Several runs, one line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from ndcheck.reports.terminal import STYLES
from ndcheck.reports.untrusted import visible

HEADER = ("run", "verdict", "unique", "diverged", "model")


def run_lines(runs: Sequence[dict[str, Any]]) -> Iterator[Text]:
    """``runs`` as `ndcheck runs --json` gives them. A line is never cut: names are to be copied."""
    rows = [_cells(run) for run in runs]
    widths = [max(map(cell_len, column)) for column in zip(HEADER, *rows, strict=True)]
    for row in (HEADER, *rows):
        line = Text(style="bold" if row is HEADER else "")
        for name, cell, width in zip(HEADER, row, widths, strict=True):
            padding = " " * (width - cell_len(cell))
            is_number = name in ("unique", "diverged")
            style = STYLES.get(cell, "") if name == "verdict" else ""  # type: ignore[call-overload]
            line.append(padding + cell if is_number else cell + padding, style)
            line.append("  ")
        line.rstrip()
        yield line


def _verdict(run: dict[str, Any]) -> str | None:
    """What the run's report says; one of an older version may have passed what diverged."""
    if run["verdict"] == "PASS" and (run["diverged_trials"] or run["n_unique"] > 1):
        return "FAIL"
    return str(run["verdict"]) if run["verdict"] else None


def _cells(run: dict[str, Any]) -> tuple[str, ...]:
    known = run["n_trials"] is not None
    return (
        visible(run["name"]),
        _verdict(run) or run["status"],
        str(run["n_unique"]) if known else "",
        f"{run['diverged_trials']}/{run['n_trials']}" if known else "",
        f"{visible(run['model'])} ({', '.join(run['arms'])})",
    )
