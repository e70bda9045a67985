"""`ndcheck order`: in which order does an op add?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import completion
from ndcheck.cli import options as o
from ndcheck.records import ARMS
from ndcheck.samplers.options import DTYPES

OPS = ("mm", "linear", "bmm", "sum", "mean", "rms_norm", "attention")
"""Those of `ndcheck.explain.order.reductions`, which imports torch."""


def order(
    op: Annotated[
        str | None,
        typer.Argument(
            help=f"{', '.join(OPS)}.",
            metavar="OP",
            show_default=False,
            autocompletion=completion.one_of(*OPS),
        ),
    ] = None,
    fn: Annotated[
        str | None,
        typer.Option(
            "--fn",
            help="Your own: takes a tensor [rows, n], returns each row's sum.",
            metavar="MODULE:FUNCTION",
        ),
    ] = None,
    rows: Annotated[
        str,
        typer.Option(
            "--rows", help="Rows (the batch, for bmm and attention).", metavar="1-4,8,..."
        ),
    ] = "1-8,15-17,31-33,64",
    terms: Annotated[
        str,
        typer.Option("--terms", help="Reduced length: K, or the KV length.", metavar="256,..."),
    ] = "256",
    columns: Annotated[
        int,
        typer.Option("--columns", help="Outputs a row has: N, or 64 for each head.", metavar="N"),
    ] = 256,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="bf16, fp16, fp32.",
            metavar="DTYPE",
            autocompletion=completion.one_of(*DTYPES),
        ),
    ] = "fp32",
    device: o.Device = "auto",
    kernels: Annotated[
        str,
        typer.Option(
            "--kernels",
            help="stock or invariant.",
            metavar="ARM",
            autocompletion=completion.one_of(*ARMS),
        ),
    ] = "stock",
    dot: Annotated[
        Path | None,
        typer.Option("--dot", help="Write the trees for Graphviz.", metavar="FILE", dir_okay=False),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="Write a drawing.", metavar="FILE", dir_okay=False)
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Read from outside in which order an op adds its terms, at every number of rows.

    Exits with 1 where the order follows the number of rows, with 3 where none can be confirmed.
    """
    from ndcheck.cli import explain_session

    sums = explain_session.Sums(op, fn, rows, terms, columns, dtype, device, kernels)
    drawings = {"dot": dot, "svg": svg}
    raise typer.Exit(explain_session.order(sums, drawings, as_json=json, quiet=quiet))
