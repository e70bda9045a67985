"""`ndcheck shrink`: the smallest load that still fails."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import completion
from ndcheck.cli import options as o
from ndcheck.request import DEFAULTS


def shrink(
    context: typer.Context,
    run: Annotated[
        Path,
        typer.Option(
            "--run",
            help="The run that failed, or latest.",
            metavar="DIR",
            autocompletion=completion.runs,
        ),
    ],
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            help="Which [default: one that diverged in the smallest batch].",
            metavar="ID",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Where the script goes [default: DIR/repro.py].",
            metavar="FILE",
            dir_okay=False,
        ),
    ] = None,
    attn: o.Attention = DEFAULTS.attention,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Shrink a failing load to the smallest, and write a script that shows the failure.

    Exits with 1 where the script shows it, as it has then been run.
    """
    from ndcheck.cli import explain_session, trust
    from ndcheck.cli.latest import latest

    given = trust.given_options(context)
    raise typer.Exit(
        explain_session.shrink(latest(run), sample, out, given, as_json=json, quiet=quiet)
    )
