"""The runs of a folder: their records, what their reports say, and what the gate said."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ndcheck.cli.console import note
from ndcheck.errors import UsageError
from ndcheck.judging.verdict import Outcome, worst
from ndcheck.records import ARMS, Arm
from ndcheck.storage.gate_verdict import GateLabel, read_gate_verdict
from ndcheck.storage.reading import read_text
from ndcheck.storage.run_directory import RUN_FILE, read_run


def read_runs(folder: Path) -> Iterator[dict[str, Any]]:
    """What is shown of each run in the folder; a damaged one is named on stderr and left out."""
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
            "by_arm": [_arm(arm, [row for row in rows if row.arm == arm]) for arm in _arms(rows)],
            "gate": _read_gate(path),
        }


def _read_gate(path: Path) -> GateLabel | None:
    try:
        return read_gate_verdict(path)
    except UsageError as error:
        note(str(error))
        return None


def _arms(rows: list[_Row]) -> list[str]:
    return list(dict.fromkeys(row.arm for row in rows))


def _arm(arm: str, rows: list[_Row]) -> dict[str, Any]:
    """The worst verdict and the most completions of any probe; trials are those of all."""
    latent = [row.latent_trials for row in rows if row.latent_trials is not None]
    return {
        "arm": arm,
        "verdict": worst([row.verdict for row in rows]),
        "n_unique": max(row.n_unique for row in rows),
        "diverged_trials": sum(row.diverged_trials for row in rows),
        "latent_trials": sum(latent) if len(latent) == len(rows) else None,
        "n_trials": sum(row.n_trials for row in rows),
    }


@dataclass(frozen=True, slots=True)
class _Row:
    """What is shown of a probe in an arm."""

    arm: Arm
    verdict: Outcome
    n_unique: int
    diverged_trials: int
    n_trials: int
    latent_trials: int | None
    """None in a table of an older version."""


def _read_summary(file: Path) -> list[_Row]:
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(file), newline="")))
        return [_read_row(row) for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        note(f"{file} cannot be read ({error}): ndcheck report writes it again")
        return []


def _read_row(row: dict[str, str]) -> _Row:
    (arm,) = (arm for arm in ARMS if arm == row["arm"])
    (verdict,) = (outcome for outcome in get_args(Outcome) if outcome == row["verdict"])
    return _Row(
        arm,
        verdict,
        int(row["n_unique"]),
        int(row["diverged_trials"]),
        int(row["n_trials"]),
        int(row["latent_trials"]) if "latent_trials" in row else None,
    )
