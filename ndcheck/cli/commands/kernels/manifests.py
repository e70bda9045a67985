"""`ndcheck kernels manifest` and `compare`: the bits of this stack, and what changed them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import options as o
from ndcheck.cli.commands.kernels.measuring import Dtypes, Op, Rows


def manifest(
    out: Annotated[Path, typer.Argument(help="The file to write.", metavar="OUT")],
    device: o.Device = "auto",
    dtype: Dtypes = "bf16,fp32",
    op: Op = "all",
    rows: Rows = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Record the bits of every op on this stack, stock and invariant, without weights.

    Digests of results on fixed operands by op, shape, dtype and number of rows; where they change
    with the number of rows; and, but for --op, whether attention gives the same bits twice as a
    decode step calls it, and in which order ops add.
    """
    from ndcheck.cli.stack import manifest_session

    raise typer.Exit(manifest_session.take(out, device, dtype, op, rows, as_json=json, quiet=quiet))


def compare(
    a: Annotated[Path, typer.Argument(help="The manifest of before.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="The manifest of after.", metavar="B")],
    json: o.Json = False,
) -> None:
    """Name the ops whose bits or class boundaries changed, and the packages that did.

    Exits with 1 where any did, with 3 where nothing was compared that could have shown it.
    """
    from ndcheck.cli.stack import manifest_session

    raise typer.Exit(manifest_session.compare(a, b, as_json=json))
