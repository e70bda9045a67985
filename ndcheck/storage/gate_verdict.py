"""What `ndcheck gate` said of a run, kept in the run's directory for `ndcheck runs`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ndcheck.errors import UsageError
from ndcheck.storage.ranges import Count
from ndcheck.storage.reading import decode, parse_json, read_text
from ndcheck.storage.run_directory import SAMPLES_FILE, replacing, write_failure

GATE_FILE = "gate.json"
SCHEMA_VERSION = 1
GateLabel = Literal["PASS", "ACCEPTED", "FAIL", "INCONCLUSIVE"]


def save_gate_verdict(directory: Path, label: str, reasons: Sequence[str]) -> None:
    """Keep the last verdict of a gate, in place of one before. Raises BackendError."""
    try:
        document = {
            "schema_version": SCHEMA_VERSION,
            "verdict": label,
            "reasons": list(reasons),
            "samples_bytes": _samples_bytes(directory),
        }
        with replacing(directory / GATE_FILE) as file:
            json.dump(document, file, indent=2)
            file.write("\n")
    except OSError as error:
        raise write_failure(directory, error) from error


def read_gate_verdict(directory: Path) -> GateLabel | None:
    """None where no gate judged the samples that are there now. Raises UsageError where damaged."""
    file = directory / GATE_FILE
    try:
        kept = decode(_GateVerdict, parse_json(read_text(file)))
        # A run that went on afterwards has other samples than those that were judged.
        return kept.verdict if kept.samples_bytes == _samples_bytes(directory) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{file} cannot be read: {reason}; ndcheck gate writes it") from error


def _samples_bytes(directory: Path) -> int:
    return (directory / SAMPLES_FILE).stat().st_size


@dataclass(frozen=True, slots=True)
class _GateVerdict:
    verdict: GateLabel
    samples_bytes: Count
