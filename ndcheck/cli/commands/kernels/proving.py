"""`ndcheck kernels prove`: which configurations of a product share its bits on this GPU?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import options as o


def prove(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Prove the products of this model [default: those of an 8B].",
            metavar="DIR",
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Time those that share its bits, and use the fastest here."),
    ] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="bf16, fp16.", metavar="DTYPE,...")
    ] = "bf16",
    device: o.Device = "auto",
    export: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Write what is proven on this machine.", metavar="FILE", dir_okay=False
        ),
    ] = None,
    import_: Annotated[
        Path | None,
        typer.Option(
            "--import",
            help="Take over what was proven on a machine of this kind, once a sample of it holds.",
            metavar="FILE",
        ),
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Prove on this GPU which configurations of a product share its bits, and use no other.

    Operands whose exact product is 0 show any other order of summation, at many numbers of rows,
    in several places, beside NaN and infinity. What is proven is kept in the user's cache for this
    GPU and these versions alone. Exit code 1 if a configuration that ndcheck would have selected
    has other bits (it is not used), 3 if the planted one was not found out.
    """
    from ndcheck.cli.stack import proofs_session

    if import_ is not None:
        raise typer.Exit(proofs_session.take_over(import_, device, quiet=quiet))
    raise typer.Exit(
        proofs_session.prove(model, dtype, device, export, tune=tune, as_json=json, quiet=quiet)
    )
