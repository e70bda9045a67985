"""`ndcheck report`: render a finished run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import completion
from ndcheck.cli import options as o


def report(
    directory: Annotated[
        Path, typer.Argument(help=o.RUN_HELP, metavar="DIR", autocompletion=completion.runs)
    ],
    html: o.Html = False,
    plots: o.Plots = False,
    json: o.Json = False,
    exit_code: o.ExitCode = False,
) -> None:
    """Render a run's reports again from its samples: no model and no GPU needed.

    Exits with 0 when it has shown them; `ndcheck gate` judges.
    """
    from ndcheck.cli import run_session
    from ndcheck.cli.latest import latest

    found = run_session.report(latest(directory), as_json=json, html=html, plots=plots)
    raise typer.Exit(found if exit_code else 0)
