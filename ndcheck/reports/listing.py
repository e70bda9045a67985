"""Several runs: a line for each, and one for each of its arms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from ndcheck.reports.terminal import STYLES
from ndcheck.reports.untrusted import visible

HEADER = "run, model, and what the gate said"
COLUMNS = ("arm", "verdict", "unique", "diverged", "latent")
NUMBERS = ("unique", "diverged", "latent")


def run_lines(runs: Sequence[dict[str, Any]], width: int = 80) -> Iterator[Text]:
    """``runs`` as `ndcheck runs --json` gives them. A name is never cut: it is to be copied."""
    tables = [list(_arm_cells(run)) for run in runs]
    rows = [COLUMNS, *(row for table in tables for row in table)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    yield Text(HEADER, style="bold")
    yield _line(COLUMNS, widths, style="bold")
    for run, table in zip(runs, tables, strict=True):
        yield from _headings(run, width)
        for row in table:
            yield _line(row, widths)


def _headings(run: dict[str, Any], width: int) -> Iterator[Text]:
    """One line, or two where one is too narrow."""
    name, about = Text(visible(run["name"])), Text(visible(run["model"]))
    if run["gate"]:
        about.append("  gate ")
        about.append(run["gate"], STYLES.get(run["gate"], "bold green"))
    if cell_len(name.plain) + 2 + cell_len(about.plain) <= width:
        yield Text.assemble(name, "  ", about)
    else:
        yield name
        yield Text.assemble("  ", about)


def _line(row: Sequence[str], widths: Sequence[int], style: str = "") -> Text:
    line = Text("  ", style=style)
    for name, cell, width in zip(COLUMNS, row, widths, strict=True):
        padding = " " * (width - cell_len(cell))
        own = STYLES.get(cell, "") if name == "verdict" else ""  # type: ignore[call-overload]
        line.append(padding + cell if name in NUMBERS else cell + padding, own)
        line.append("  ")
    line.rstrip()
    return line


def _arm_cells(run: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    if not run["by_arm"]:
        yield ", ".join(run["arms"]), run["status"], "", "", ""
    for arm in run["by_arm"]:
        latent = arm["latent_trials"]
        yield (
            arm["arm"],
            _verdict(arm),
            str(arm["n_unique"]),
            f"{arm['diverged_trials']}/{arm['n_trials']}",
            "" if latent is None else f"{latent}/{arm['n_trials']}",
        )


def _verdict(arm: dict[str, Any]) -> str:
    """What the run's report says; one of an older version may have passed what diverged."""
    if arm["verdict"] == "PASS" and (arm["diverged_trials"] or arm["n_unique"] > 1):
        return "FAIL"
    return str(arm["verdict"])
