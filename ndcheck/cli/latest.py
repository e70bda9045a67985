"""`latest`: the newest run of the folder that runs go to, where a run is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ndcheck.errors import UsageError
from ndcheck.runner import RUNS_DIRECTORY
from ndcheck.storage.reading import exists
from ndcheck.storage.run_directory import RUN_FILE, read_run

NAME = "latest"


def latest(path: Path) -> Path:
    """``path``, or the run that started last if it is ``latest`` and nothing has that name.

    Raises UsageError where there is none.
    """
    if str(path) != NAME or exists(path):
        return path
    started = dict(_started())
    if not started:
        raise UsageError(f"latest: {RUNS_DIRECTORY} holds no run")
    return max(started, key=lambda run: (started[run], run.name))


def _started() -> Iterator[tuple[Path, str]]:
    """The runs that can be read, and when they began."""
    for path in RUNS_DIRECTORY.iterdir() if RUNS_DIRECTORY.is_dir() else ():
        if exists(path / RUN_FILE):
            try:
                yield path, read_run(path).started_at
            except UsageError:
                continue
