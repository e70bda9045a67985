"""What `ndcheck trace` leaves in a run's directory, for its reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ndcheck.errors import UsageError
from ndcheck.storage.ranges import Count
from ndcheck.storage.reading import decode, parse_json, read_text
from ndcheck.storage.run_directory import replacing, write_failure

EXPLANATION_FILE = "explanation.json"
SCHEMA_VERSION = 1


def save_explanation(directory: Path, sample_id: int, advice: Mapping[int, Sequence[str]]) -> None:
    """Keep the advice on one sample, by step, in place of what was there.

    Raises BackendError if the disk refuses.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "sample_id": sample_id,
        "steps": [{"step": step, "advice": list(lines)} for step, lines in advice.items()],
    }
    try:
        with replacing(directory / EXPLANATION_FILE) as file:
            json.dump(document, file, indent=2)
            file.write("\n")
    except OSError as error:
        raise write_failure(directory, error) from error


def read_advice(directory: Path) -> list[str]:
    """The advice of the last trace of this run, each naming its sample; empty without one.

    Raises UsageError where the file is damaged.
    """
    file = directory / EXPLANATION_FILE
    try:
        explanation = decode(_Explanation, parse_json(read_text(file)))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{file} cannot be read: {reason}; delete it or trace again") from error
    return [
        f"sample {explanation.sample_id}, token {step.step + 1}: {sentence}"
        for step in explanation.steps
        for sentence in step.advice
    ]


@dataclass(frozen=True, slots=True)
class _Step:
    step: Count
    advice: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Explanation:
    sample_id: Count
    steps: tuple[_Step, ...]
