"""`ndcheck runs`: a folder of runs at a glance."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from ndcheck.cli import options as o


def runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs are.", metavar="DIR")] = Path(
        "ndcheck-runs"
    ),
    json: o.Json = False,
) -> None:
    """List the runs of a folder, the newest first."""
    from rich.console import Console

    from ndcheck.cli.runs_session import read_runs
    from ndcheck.errors import UsageError
    from ndcheck.reports.listing import run_lines
    from ndcheck.storage.reading import exists
    from ndcheck.storage.run_directory import RUN_FILE

    if not exists(folder) or not folder.is_dir():
        raise UsageError(f"{folder} is no directory of runs")
    found = sorted(read_runs(folder), key=lambda run: str(run["started_at"]), reverse=True)
    if not found and (folder / RUN_FILE).is_file():
        raise UsageError(f"{folder} is a run itself: ndcheck report {quote(str(folder))} shows it")
    if json:
        typer.echo(json_module.dumps(found, indent=2))
    elif not found:
        raise UsageError(f"{folder} holds no run")
    else:
        console = Console(highlight=False)
        for line in run_lines(found, console.width):
            console.print(line, soft_wrap=True)
