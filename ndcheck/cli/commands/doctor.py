"""`ndcheck doctor`: this environment, and whether ndcheck catches what it should."""

from __future__ import annotations

import typer

from ndcheck.cli import options as o


def doctor(json: o.Json = False) -> None:
    """Show what decides bits on this machine, and catch planted faults."""
    from ndcheck.cli import doctor_session

    raise typer.Exit(doctor_session.check_up(as_json=json))
