"""Several runs as a table, one line each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from rich.table import Table
from rich.text import Text

from ndcheck.reports.terminal import STYLES
from ndcheck.reports.untrusted import visible


def runs_table(runs: Sequence[dict[str, Any]]) -> Table:
    """``runs`` as `ndcheck runs --json` gives them."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("model", overflow="fold")
    table.add_column("arms")
    table.add_column("verdict", no_wrap=True)
    for name in ("unique", "diverged"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        verdict = run["verdict"]
        label = Text(verdict, style=STYLES[verdict]) if verdict else Text(run["status"])
        diverged = "" if run["n_trials"] is None else f"{run['diverged_trials']}/{run['n_trials']}"
        table.add_row(
            Text(visible(PurePath(run["directory"]).name)),
            Text(visible(run["model"])),
            Text(", ".join(run["arms"])),
            label,
            "" if run["n_unique"] is None else str(run["n_unique"]),
            diverged,
        )
    return table
