"""`--help` with the options of some backends under headings of their own."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

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


def heading(name: str) -> str:
    """Whose option it is."""
    whose = owners(name) if name in OPTIONS else BACKENDS
    if len(whose) == len(BACKENDS):
        return "Options"
    return f"Options of {' and '.join(backend.title for backend in whose)}"
