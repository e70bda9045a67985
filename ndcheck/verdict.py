"""Rules that turn a summary into PASS, FAIL or INCONCLUSIVE, each with its reasons."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ndcheck.analysis.summary import AxisFinding, ProbeSummary, Summary
from ndcheck.records import Arm, Axis, Run, RunSpec

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
STATUS_REASONS = {
    "running": "the run is still going on, or its process was killed",
    "interrupted": "the run was interrupted before it finished",
    "failed": "the run failed before it finished",
}
STOCK_DID_NOT_FAIL = (
    "the stock arm, its control, did not fail under these loads: try larger --loads"
)
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


def judge(run: Run, summary: Summary) -> Judgement:
    """The run's verdict: FAIL over INCONCLUSIVE over PASS, over probes, arms and properties.

    A PASS needs evidence: every property asked for was tried, every batch was witnessed at the
    size asked for, nothing errored, the run finished on the backend it began with, and the planted
    fault was caught. With both
    arms, stock is the invariant arm's control too: where it did not fail, nothing is shown.
    """
    probes = tuple(judge_probe(probe, run.spec) for probe in summary.probes)
    failed_stock = {p.probe_id for p in probes if p.arm == "stock" and p.verdict.outcome == "FAIL"}
    if "stock" in run.spec.arms:
        probes = tuple(
            p if p.arm == "stock" or p.probe_id in failed_stock else _without_stock_control(p)
            for p in probes
        )
    outcomes = [p.verdict for p in probes]
    reasons: list[str] = []
    if not probes:
        outcomes = [Verdict("INCONCLUSIVE", ("no sample was taken",))]
    if run.status != "finished":
        outcomes.append(Verdict("INCONCLUSIVE", (STATUS_REASONS[run.status],)))
    of_server = (c for p in summary.probes if p.serving for c in p.serving.changes)
    changes = tuple(dict.fromkeys((*run.changes, *of_server)))
    if changes:
        outcomes.append(Verdict("INCONCLUSIVE", changes))
    outcome = worst([v.outcome for v in outcomes])
    for verdict in outcomes:
        if verdict.outcome == outcome:
            reasons += [r for r in verdict.reasons if r not in reasons]
    # A changed backend may explain a failure: that is said whatever the outcome.
    reasons += [r for r in changes if r not in reasons]
    return Judgement(Verdict(outcome, tuple(reasons)), probes)


def judge_probe(probe: ProbeSummary, spec: RunSpec) -> ProbeVerdict:
    """The verdict on one probe in one arm, over the properties that were asked for."""
    findings = {finding.axis: finding for finding in probe.axes}
    axes: dict[Axis, Verdict] = {
        axis: judge_axis(axis, findings.get(axis), spec) for axis in spec.axes
    }
    doubts = [reason for reason in (check(probe) for check in DOUBTS) if reason]
    doubts += probe.serving.doubts if probe.serving else ()
    outcome = worst([v.outcome for v in axes.values()])
    if outcome == "PASS" and doubts:
        outcome = "INCONCLUSIVE"
    reasons = [r for v in axes.values() if v.outcome == outcome for r in v.reasons]
    if outcome == "INCONCLUSIVE":
        reasons = doubts + reasons
    return ProbeVerdict(probe.arm, probe.probe_id, Verdict(outcome, tuple(reasons)), axes)


def judge_axis(axis: Axis, finding: AxisFinding | None, spec: RunSpec) -> Verdict:
    """One property: FAIL if any trial diverged, or only its bits did and that is not allowed."""
    if finding is None or finding.n_trials == 0:
        return Verdict("INCONCLUSIVE", (f"{axis}: no trial compared it",))
    n, k, latent = finding.n_trials, finding.diverged_trials, finding.latent_trials
    if k:
        return Verdict("FAIL", (f"{axis}: tokens diverged in {k} of {n} trials",))
    if latent and not spec.allow_latent:
        return Verdict(
            "FAIL", (f"{axis}: tokens equal, but bits differed in {latent} of {n} trials",)
        )
    return Verdict("PASS", (f"{axis}: 0 of {n} trials diverged",))


def _without_stock_control(probe: ProbeVerdict) -> ProbeVerdict:
    if probe.verdict.outcome != "PASS":
        return probe
    reasons = (STOCK_DID_NOT_FAIL, *probe.verdict.reasons)
    return replace(probe, verdict=Verdict("INCONCLUSIVE", reasons))


def _lacks_control(probe: ProbeSummary) -> str | None:
    if probe.control.n_trials == 0:
        return "no control ran, so nothing shows that a divergence would have been seen"
    if probe.control.n_caught < probe.control.n_trials:
        is_short = any(completion.n_tokens < 2 for completion in probe.completions[:1])
        why = " (a completion of one token is too short for it)" if is_short else ""
        return (
            f"the planted fault was caught in {probe.control.n_caught} of "
            f"{probe.control.n_trials} controls{why}"
        )
    return None


def _lacks_witness(probe: ProbeSummary) -> str | None:
    if not probe.unwitnessed_trials:
        return None
    asked = max((load.batch_size for load in probe.loads), default=0)
    seen = max((load.achieved_batch_size_min or 0 for load in probe.loads), default=0)
    hint = f" (largest batch seen: {seen}, asked for: {asked})" if 0 < seen < asked else ""
    return (
        "trials whose batch was not witnessed at the size asked for: "
        f"{probe.unwitnessed_trials} of {probe.n_trials}{hint}"
    )


def _has_errors(probe: ProbeSummary) -> str | None:
    if probe.n_errors:
        return f"samples that ended in an error: {probe.n_errors}"
    return None


DOUBTS = (_has_errors, _lacks_witness, _lacks_control)
"""Rules that keep a clean result from passing; each returns a reason or None."""


def worst(outcomes: list[Outcome]) -> Outcome:
    """FAIL over INCONCLUSIVE over PASS."""
    order: tuple[Outcome, ...] = ("FAIL", "INCONCLUSIVE", "PASS")
    return min(outcomes, key=order.index)
