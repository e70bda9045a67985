"""`ndcheck demo`: where nondeterminism comes from, in one screen."""

from __future__ import annotations

import typer


def demo() -> None:
    """Show on this machine why the same row gets other bits in another batch."""
    from ndcheck.explain.order.demo import demo_lines

    for line in demo_lines():
        typer.echo(line)
