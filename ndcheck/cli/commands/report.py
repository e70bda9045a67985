"""`ndcheck report`: render a finished run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import options as o


def report(
    directory: Annotated[Path, typer.Argument(help="A run's directory.", metavar="DIR")],
    html: o.Html = False,
    plots: o.Plots = False,
    json: o.Json = False,
) -> None:
    """Render a run's reports again from its samples: no model and no GPU needed."""
    from ndcheck.cli import run_session

    raise typer.Exit(run_session.report(directory, as_json=json, html=html, plots=plots))
