"""`ndcheck kernels check` and `bench`: bits, accuracy and time beside stock."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import options as o

Op = Annotated[
    str, typer.Option("--op", help="all, or ops: linear,rms_norm,decode,...", metavar="OP,...")
]
Dtypes = Annotated[str, typer.Option("--dtype", help="bf16, fp16, fp32.", metavar="DTYPE,...")]
Rows = Annotated[
    str | None, typer.Option("--rows", help="Numbers of rows [default: a range].", metavar="M,...")
]
Csv = Annotated[
    Path | None,
    typer.Option(
        "--csv",
        help="Write each op, dtype and number of rows there as it is done.",
        metavar="FILE",
        dir_okay=False,
    ),
]


def check(
    device: o.Device = "auto",
    dtype: Dtypes = "bf16,fp16,fp32",
    op: Op = "all",
    rows: Rows = None,
    csv: Csv = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Do all batches give a row the same bits, and is the op as accurate as stock's?

    Every op is computed for rows alone and in batches of many sizes, in several places, beside NaN
    and infinity; errors are against float64. Exit code 1 if an invariant op has more than one bit
    class or too large an error, 3 if a planted fault was not caught or an op was refused.
    """
    from ndcheck.cli import kernels_session

    selection = kernels_session.read_selection(device, dtype, op, rows)
    raise typer.Exit(kernels_session.run_check(selection, csv, as_json=json, quiet=quiet))


def bench(
    device: o.Device = "auto",
    dtype: Dtypes = "bf16",
    op: Op = "all",
    rows: Rows = None,
    csv: Csv = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Time ops in both arms: ratio to stock, TFLOP/s, GB/s, share of the measured ceiling.

    The arms take turns on the same operands. Ratio is stock's time over ours: above 1 is faster.
    """
    from ndcheck.cli import kernels_session

    selection = kernels_session.read_selection(device, dtype, op, rows)
    raise typer.Exit(kernels_session.run_bench(selection, csv, as_json=json, quiet=quiet))
