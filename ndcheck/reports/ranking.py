"""Of many prompts: which come first, and how many there are of each verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ndcheck.analysis.summary import ProbeSummary
from ndcheck.findings import Findings
from ndcheck.judging.verdict import Outcome, count
from ndcheck.records import ARMS

MAX_VERDICTS = 8
MAX_OF_MANY = 3
"""Of more failed prompts than verdicts are shown: commands that measure one alone."""
OUTCOMES: tuple[Outcome, ...] = ("FAIL", "INCONCLUSIVE", "PASS")


def worst_first(findings: Findings) -> list[ProbeSummary]:
    """By verdict, then by rate of divergence, then by how early completions part."""
    verdicts = findings.verdicts

    def place(probe: ProbeSummary) -> tuple[int, float, int]:
        outcome = verdicts[probe.arm, probe.probe_id].verdict.outcome
        return OUTCOMES.index(outcome), -(probe.divergence_rate or 0), probe.common_prefix_tokens

    return sorted(findings.summary.probes, key=place)


def failed_probes(findings: Findings) -> list[str]:
    """Ids of the probes that failed in any arm, each once: in the order of the run, of many the
    worst first."""
    probes: Sequence[ProbeSummary] = findings.summary.probes
    if len(probes) > MAX_VERDICTS:
        probes = worst_first(findings)
    verdicts = (findings.verdicts[probe.arm, probe.probe_id] for probe in probes)
    return list(dict.fromkeys(v.probe_id for v in verdicts if v.verdict.outcome == "FAIL"))


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
