"""`ndcheck kernels`: the batch-invariant kernels beside stock, and proofs of this machine."""

from __future__ import annotations

import typer

from ndcheck.cli.commands.kernels.manifests import compare, manifest
from ndcheck.cli.commands.kernels.measuring import bench, check
from ndcheck.cli.commands.kernels.proving import prove
from ndcheck.cli.usage.grouped_help import WholeGroup

kernels = typer.Typer(
    name="kernels",
    cls=WholeGroup,
    help="Check, time and prove the batch-invariant kernels beside stock.",
)


@kernels.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Check, time and prove the batch-invariant kernels beside stock."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for command in (check, bench, prove, manifest, compare):
    kernels.command()(command)
