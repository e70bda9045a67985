"""The values that a shell offers when a user presses the tab key."""

from __future__ import annotations

from collections.abc import Callable

Complete = Callable[[str], list[str]]


def one_of(*names: str) -> Complete:
    """Those of ``names`` that go on with what was typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def some_of(*names: str) -> Complete:
    """The same after the last comma, without those before it."""

    def complete(incomplete: str) -> list[str]:
        typed, comma, last = incomplete.rpartition(",")
        rest = (name for name in names if name not in typed.split(","))
        return [f"{typed}{comma}{name}" for name in rest if name.startswith(last)]

    return complete


def runs(incomplete: str) -> list[str]:
    """Directories of runs, the newest first as they are named by time."""
    from ndcheck.cli.latest import NAME
    from ndcheck.runner import RUNS_DIRECTORY

    names = sorted((str(path.parent) for path in RUNS_DIRECTORY.glob("*/run.json")), reverse=True)
    return [name for name in (NAME, *names) if name.startswith(incomplete)]
