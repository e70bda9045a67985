"""Rules that turn a summary into PASS, FAIL or INCONCLUSIVE, each with its reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ndcheck.records import Arm, Axis

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
EXIT_CODES: dict[Outcome, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


@dataclass(frozen=True, slots=True)
class Verdict:
    """An outcome and the sentences that justify it, the decisive one first."""

    outcome: Outcome
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProbeVerdict:
    """The verdict on one probe in one arm, and on each invariance property asked for."""

    arm: Arm
    probe_id: str
    verdict: Verdict
    axes: dict[Axis, Verdict]


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on a run: as bad as its worst probe and arm."""

    verdict: Verdict
    probes: tuple[ProbeVerdict, ...]
