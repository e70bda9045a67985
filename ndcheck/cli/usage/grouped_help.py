"""`--help`: options of some backends under headings of their own, commands in whole sentences."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from ndcheck.samplers.backends import BACKENDS, OPTIONS, owners


class GroupedCommand(TyperCommand):
    """A command whose parameters are options of a run, among others."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write them by the backends that take them, those of all first."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            shown = parameter.get_help_record(ctx)
            if shown is not None:
                sections.setdefault(heading(parameter.name or ""), []).append(shown)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


class WholeGroup(TyperGroup):
    """Commands, each with the first sentence of its help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write all of that sentence: a line of 80 columns has room for half of most."""
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, each.get_short_help_str(limit=1000)) for name, each in commands]
            )


def heading(name: str) -> str:
    """Whose option it is."""
    whose = owners(name) if name in OPTIONS else BACKENDS
    if len(whose) == len(BACKENDS):
        return "Options"
    return f"Options of {' and '.join(backend.title for backend in whose)}"
