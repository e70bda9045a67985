"""What `ndcheck score` found, as much of it as a gate judges: the file of its directory."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ndcheck.errors import UsageError
from ndcheck.records import Arm
from ndcheck.storage.ranges import Count, NotNegative, RawText
from ndcheck.storage.reading import decode, exists, parse_json, read_text
from ndcheck.storage.run_directory import RUN_FILE, replacing, write_failure

SCORE_FILE = "score.json"
SCHEMA_VERSION = 1
Control = Literal["caught", "missed", "absent"]


@dataclass(frozen=True, slots=True)
class ArmScore:
    """Recorded completions of an arm, or of a file, against their scores.

    ``n_missing`` completions have no score. ``first_difference`` is the least index of a token
    with other bits, from 0. ``max_difference`` is in nats and ``k3_kl`` in nats a token; both are
    None without a token, and the largest float where they are infinite. ``is_rounded``: the scores
    hold fewer digits than fp32.
    """

    arm: Arm | None
    n_completions: Count
    n_distinct: Count
    n_missing: Count
    n_tokens: Count
    n_differ: Count
    n_differing_completions: Count
    first_difference: Count | None
    max_difference: NotNegative | None
    k3_kl: NotNegative | None
    is_rounded: bool


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """A recording that was scored; ``doubts`` keep what was measured of it from passing.

    ``is_rounded``: the recorded numbers hold fewer digits than fp32.
    """

    recorded: RawText
    scored_by: RawText
    control: Control
    is_rounded: bool
    doubts: tuple[str, ...]
    arms: tuple[ArmScore, ...]


def finite(number: float | None) -> float | None:
    """JSON has no infinity; no limit is above the largest float."""
    return None if number is None else min(number, sys.float_info.max)


def check_new(directory: Path) -> None:
    """Raise UsageError for a directory that holds anything."""
    if exists(directory) and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"--out {directory}: it is not empty; choose a new folder")


def save_score(directory: Path, score: ScoreSummary) -> None:
    """Write the file into a new or empty directory. Raises BackendError."""
    document = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(score)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / SCORE_FILE) as file:
            json.dump(document, file, indent=2, allow_nan=False)
            file.write("\n")
    except OSError as error:
        raise write_failure(directory, error) from error


def holds_score(directory: Path) -> bool:
    """Raises UsageError where there is a run too: a verdict on one says nothing of the other."""
    holds = exists(directory / SCORE_FILE)
    if holds and exists(directory / RUN_FILE):
        raise UsageError(f"{directory} holds a run and a score: keep them in folders of their own")
    return holds


def read_score(directory: Path) -> ScoreSummary:
    """Raises UsageError where the file is not there, damaged, or contradicts itself."""
    file = directory / SCORE_FILE
    try:
        document = parse_json(read_text(file))
        version = document.get("schema_version") if isinstance(document, dict) else None
        if type(version) is not int or not 0 < version <= SCHEMA_VERSION:
            raise ValueError(
                f"schema version {version!r:.40} is none of those up to {SCHEMA_VERSION} that this "
                "ndcheck reads"
            )
        score = decode(ScoreSummary, document)
        if not score.arms:
            raise ValueError("arms: it holds none")
        for arm in score.arms:
            _check(arm)
    except FileNotFoundError:
        raise UsageError(
            f"{directory} holds no score: ndcheck score RUN --out {directory} makes one"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{file} cannot be read: {reason}") from error
    return score


def _check(arm: ArmScore) -> None:
    differs = arm.n_differ > 0
    is_possible = (
        arm.n_differ <= arm.n_tokens
        and arm.n_distinct <= arm.n_completions
        and arm.n_differing_completions <= min(arm.n_completions, arm.n_differ)
        and differs == (arm.first_difference is not None) == (arm.n_differing_completions > 0)
        and (arm.n_tokens > 0) == (arm.max_difference is not None) == (arm.k3_kl is not None)
        # Numbers that are one in fp32 may be two in more digits; those that are two never are one.
        and not (differs and not arm.max_difference)
    )
    if not is_possible:
        raise ValueError(f"{arm.arm or 'arms'}: its numbers contradict each other")
