"""`ndcheck help`: what `--help` prints, as other tools have it."""

from __future__ import annotations

from typing import Annotated

import typer

from ndcheck.errors import UsageError, did_you_mean


def show_help(
    context: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(help="A command, such as kernels check.", metavar="COMMAND"),
    ] = None,
) -> None:
    """Show the help of a command."""
    place = context.find_root()
    for name in command or ():
        commands = getattr(place.command, "commands", {})
        if name not in commands:
            raise UsageError(f"help {name}: there is no such command{did_you_mean(name, commands)}")
        place = type(place)(commands[name], parent=place, info_name=name)
    typer.echo(place.get_help())
