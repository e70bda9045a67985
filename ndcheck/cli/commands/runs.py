"""`ndcheck runs`: a folder of runs at a glance."""

from __future__ import annotations

import csv
import io
import json as json_module
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ndcheck.cli import options as o

if TYPE_CHECKING:
    from ndcheck.judging.verdict import Outcome


def runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs are.", metavar="DIR")] = Path(
        "ndcheck-runs"
    ),
    json: o.Json = False,
) -> None:
    """List the runs of a folder, the newest first."""
    from rich.console import Console

    from ndcheck.errors import UsageError
    from ndcheck.reports.listing import run_lines
    from ndcheck.storage.reading import exists

    if not exists(folder) or not folder.is_dir():
        raise UsageError(f"{folder} is no directory of runs")
    found = sorted(_read(folder), key=lambda run: str(run["started_at"]), reverse=True)
    if json:
        typer.echo(json_module.dumps(found, indent=2))
    elif not found:
        raise UsageError(f"{folder} holds no run")
    else:
        console = Console(highlight=False)
        for line in run_lines(found):
            console.print(line, soft_wrap=True)


def _read(folder: Path) -> Iterator[dict[str, Any]]:
    from ndcheck.cli.console import note
    from ndcheck.errors import UsageError
    from ndcheck.judging.verdict import worst
    from ndcheck.storage.run_directory import RUN_FILE, read_run

    for path in folder.iterdir():
        if not (path / RUN_FILE).is_file():
            continue
        try:
            run = read_run(path)
        except UsageError as error:
            note(str(error))
            continue
        rows = _read_summary(path / "summary.csv")
        yield {
            "name": path.name,
            "directory": str(path),
            "started_at": run.started_at,
            "model": run.spec.model,
            "arms": list(run.spec.arms),
            "status": run.status,
            # The reports hold these: a run that was killed has none until `ndcheck report`.
            "verdict": worst([row.verdict for row in rows]) if rows else None,
            "n_unique": max((row.n_unique for row in rows), default=None),
            "diverged_trials": sum(row.diverged_trials for row in rows) if rows else None,
            "n_trials": sum(row.n_trials for row in rows) if rows else None,
        }


@dataclass(frozen=True, slots=True)
class _Row:
    """What is shown of a probe in an arm."""

    verdict: Outcome
    n_unique: int
    diverged_trials: int
    n_trials: int


def _read_summary(file: Path) -> list[_Row]:
    from ndcheck.cli.console import note
    from ndcheck.storage.reading import read_text

    try:
        rows = list(csv.DictReader(io.StringIO(read_text(file), newline="")))
        return [_read_row(row) for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        note(f"{file} cannot be read ({error}): ndcheck report writes it again")
        return []


def _read_row(row: dict[str, str]) -> _Row:
    from ndcheck.judging.verdict import Outcome

    (verdict,) = (outcome for outcome in get_args(Outcome) if outcome == row["verdict"])
    return _Row(verdict, int(row["n_unique"]), int(row["diverged_trials"]), int(row["n_trials"]))
