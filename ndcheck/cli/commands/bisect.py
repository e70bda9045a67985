"""`ndcheck bisect`: which package of an upgrade flips a verdict?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import options as o


def bisect(
    command: Annotated[
        list[str],
        typer.Argument(
            help="Run in each environment: exit code 0 is good, 1 is bad.", metavar="-- COMMAND"
        ),
    ],
    good: Annotated[
        Path, typer.Option("--good", help="Pins with which it passes.", metavar="LOCK")
    ],
    bad: Annotated[Path, typer.Option("--bad", help="Pins with which it fails.", metavar="LOCK")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="Environment, logs and what was tested: run again to go on.",
            metavar="DIR",
        ),
    ] = Path("ndcheck-bisect"),
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Name the package that flips a verdict between two lock files.

    Installs what lies between them into a virtual environment (with uv where it is there, else
    pip), half of the differing packages at a time, and runs the command there, such as
    -- ndcheck gate. Lock files are requirements, each pinned, as pip freeze writes them.
    """
    from ndcheck.cli.stack import bisect_session

    raise typer.Exit(bisect_session.run(good, bad, command, out, as_json=json, quiet=quiet))
