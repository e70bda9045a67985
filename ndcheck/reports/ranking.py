"""Of many prompts: which come first, and how many there are of each verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ndcheck.analysis.summary import ProbeSummary
from ndcheck.findings import Findings
from ndcheck.judging.verdict import Outcome, count
from ndcheck.records import ARMS

OUTCOMES: tuple[Outcome, ...] = ("FAIL", "INCONCLUSIVE", "PASS")


def worst_first(findings: Findings) -> list[ProbeSummary]:
    """By verdict, then by rate of divergence, then by how early completions part."""
    verdicts = findings.verdicts

    def place(probe: ProbeSummary) -> tuple[int, float, int]:
        outcome = verdicts[probe.arm, probe.probe_id].verdict.outcome
        return OUTCOMES.index(outcome), -(probe.divergence_rate or 0), probe.common_prefix_tokens

    return sorted(findings.summary.probes, key=place)


def tally(probes: Sequence[ProbeSummary], findings: Findings) -> str:
    """``"1000 prompts: stock 990 FAIL, 10 PASS; invariant 1000 PASS"``."""
    n_prompts = len({probe.probe_id for probe in probes})
    arms = [arm for arm in ARMS if any(probe.arm == arm for probe in probes)]
    parts = []
    for arm in arms:
        counts = Counter(
            findings.verdicts[arm, probe.probe_id].verdict.outcome
            for probe in probes
            if probe.arm == arm
        )
        numbers = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o])
        parts.append(f"{arm} {numbers}" if len(arms) > 1 else numbers)
    return f"{count(n_prompts, 'prompt')}: {'; '.join(parts)}"
