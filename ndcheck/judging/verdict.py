"""Rules that turn a summary into PASS, FAIL or INCONCLUSIVE, each with its reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Literal

from ndcheck.analysis import serving
from ndcheck.analysis.statistics import trials_needed
from ndcheck.analysis.summary import AxisFinding, ProbeSummary, Summary
from ndcheck.records import AXES, Arm, Axis, Run, RunSpec

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
STATUS_REASONS = {
    "running": "the run is still going on, or its process was killed",
    "interrupted": "the run was interrupted before it finished",
    "failed": "the run failed before it finished",
}
STOCK_DID_NOT_FAIL = (
    "the stock arm, its control, did not fail under these loads: try larger --loads"
)
SERVERS_SAMPLING = (
    "no temperature was sent: sampling is the server's, so what diverges may be a draw of it"
)
MOST_OF_ERROR = 160
"""Characters of the first failed sample's error in a reason."""
NOT_TOLD_APART = "not told apart from run-to-run"


@dataclass(frozen=True, slots=True)
class Verdict:
    """An outcome and the sentences that justify it, the decisive one first.

    ``accepts_divergence``: something diverged, and a limit that the user set allows it.
    """

    outcome: Outcome
    reasons: tuple[str, ...]
    accepts_divergence: bool = False

    @property
    def label(self) -> str:
        """The outcome as it is shown: no PASS stands beside what diverged."""
        return "ACCEPTED" if self.outcome == "PASS" and self.accepts_divergence else self.outcome


@dataclass(frozen=True, slots=True)
class ProbeVerdict:
    """The verdict on one probe in one arm, and on each property asked for, or seen to diverge."""

    arm: Arm
    probe_id: str
    verdict: Verdict
    axes: dict[Axis, Verdict]


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on a run: as bad as its worst probe and arm."""

    verdict: Verdict
    probes: tuple[ProbeVerdict, ...]


def count(number: int, noun: str) -> str:
    """``"1 load"``, ``"2 loads"``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def run_doubts(run: Run) -> tuple[str, ...]:
    """What keeps any of a run's probes from passing: how it ended, its backend, its samples."""
    status = () if run.status == "finished" else (STATUS_REASONS[run.status],)
    return (*status, *run.changes, *run.flaws)


def server_changes(summary: Summary) -> tuple[str, ...]:
    """What the answers say of a server that was not one and the same, a sentence each."""
    return serving.server_changes(p.serving for p in summary.probes if p.serving)


def servers_sampling(spec: RunSpec) -> tuple[str, ...]:
    """What to know of a verdict where the server was not asked to be greedy."""
    omits = spec.endpoint is not None and spec.endpoint.omits_temperature
    return (SERVERS_SAMPLING,) if omits else ()


def judge(run: Run, summary: Summary) -> Judgement:
    """The run's verdict: FAIL over INCONCLUSIVE over PASS, over probes, arms and properties.

    Any divergence that was seen fails, asked for or not. A PASS needs evidence: every property
    asked for was tried, every batch was witnessed at the size asked for, nothing errored, the run
    finished on the backend it began with, its samples are those that were planned, and the planted
    fault was caught. With both arms, stock is the invariant arm's control too: where it did not
    fail, nothing is shown.
    """
    doubts = (*run_doubts(run), *server_changes(summary))
    probes = tuple(judge_probe(probe, run.spec) for probe in summary.probes)
    failed_stock = {p.probe_id for p in probes if p.arm == "stock" and p.verdict.outcome == "FAIL"}
    if "stock" in run.spec.arms:
        probes = tuple(
            p if p.arm == "stock" or p.probe_id in failed_stock else _weaken(p, STOCK_DID_NOT_FAIL)
            for p in probes
        )
    if doubts:
        probes = tuple(_weaken(p, *doubts) for p in probes)
    outcomes = [p.verdict for p in probes]
    reasons: list[str] = []
    if not probes:
        outcomes = [Verdict("INCONCLUSIVE", ("no sample was taken",))]
    if doubts:
        outcomes.insert(0, Verdict("INCONCLUSIVE", doubts))
    outcome = worst([v.outcome for v in outcomes])
    for verdict in outcomes:
        if verdict.outcome == outcome:
            reasons += [r for r in verdict.reasons if r not in reasons]
    # A changed backend may explain a failure, and so may what is missing: that is always said.
    always = (*run.changes, *server_changes(summary), *run.flaws, *servers_sampling(run.spec))
    reasons += [r for r in always if r not in reasons]
    return Judgement(Verdict(outcome, tuple(reasons)), probes)


def judge_probe(probe: ProbeSummary, spec: RunSpec) -> ProbeVerdict:
    """The verdict on one probe in one arm, over every comparison that was made."""
    findings = {finding.axis: finding for finding in probe.axes}
    axes = {axis: judge_axis(axis, findings.get(axis), spec) for axis in judged_axes(probe, spec)}
    divergence = judge_divergence(probe, allow_latent=spec.allow_latent)
    doubts = probe_doubts(probe, spec)
    outcome = worst([divergence.outcome, *(v.outcome for v in axes.values())])
    if outcome == "PASS" and doubts:
        outcome = "INCONCLUSIVE"
    reasons = [r for v in axes.values() if v.outcome == outcome for r in v.reasons]
    if outcome == "INCONCLUSIVE":
        reasons = doubts + reasons
    elif not reasons:
        # Nothing else fails: what was seen is laid to no property.
        unclear = (r for v in axes.values() if v.outcome == "INCONCLUSIVE" for r in v.reasons)
        reasons = [*divergence.reasons, *unclear]
    return ProbeVerdict(probe.arm, probe.probe_id, Verdict(outcome, tuple(reasons)), axes)


def judged_axes(probe: ProbeSummary, spec: RunSpec) -> list[Axis]:
    """The properties asked for, and those along which something differed all the same."""
    differing = {f.axis for f in probe.axes if f.diverged_trials or f.latent_trials}
    return [axis for axis in AXES if axis in spec.axes or axis in differing]


def judge_divergence(
    probe: ProbeSummary, *, allow_latent: bool, allow_tokens: bool = False
) -> Verdict:
    """FAIL if any two completions differ, in whatever comparison, asked for or not."""
    n = probe.n_draws
    seen = f"{probe.diverged_draws} of {count(n, probe.draw)} diverged from the probe alone"
    unique = f"{probe.n_unique} unique completions of {probe.n_samples}"
    if probe.has_diverged and not allow_tokens:
        return Verdict("FAIL", (f"{seen}; {unique}" if n else unique,))
    if probe.has_latent and not allow_latent:
        return Verdict("FAIL", ("the bits of equal completions differed",))
    is_seen = n or any(finding.n_trials for finding in probe.axes)
    outcome: Outcome = "PASS" if is_seen else "INCONCLUSIVE"
    return Verdict(outcome, (seen,), accepts_divergence=probe.has_diverged)


def judge_axis(axis: Axis, finding: AxisFinding | None, spec: RunSpec) -> Verdict:
    """One property: FAIL if any trial diverged, or only its bits did and that is not allowed.

    INCONCLUSIVE where that may be run-to-run: the run fails, but not by this property.
    """
    if finding is None or finding.n_trials == 0:
        return Verdict("INCONCLUSIVE", (f"{axis}: no trial compared it",))
    n, k, n_latent = finding.shown
    draws = count(n, finding.draw)
    outcome: Outcome = "FAIL" if finding.told_apart is not False else "INCONCLUSIVE"
    note = "" if outcome == "FAIL" else f"; {NOT_TOLD_APART}"
    if finding.told_apart and finding.rate is None:
        n_alone = finding.alone.diverged_trials + finding.alone.latent_trials
        note = f"; alone in {n_alone} of {finding.alone.n_trials}, and in none of its repeats"
    elif finding.draw == "load" and finding.told_apart and finding.n_confirmed:
        note = f"; {finding.n_confirmed} of them repeated, alike each time"
    details = fed_details(finding)
    if finding.diverged_trials:
        return Verdict(outcome, (f"{axis}: tokens diverged in {k} of {draws}{note}", *details))
    if finding.latent_trials and not spec.allow_latent:
        latent = f"{n_latent} of {draws}"
        reason = f"{axis}: tokens equal, but bits differed in {latent}{note}"
        return Verdict(outcome, (reason, *details))
    if finding.feeds_other_tokens or (finding.feeds_other_bits and not spec.allow_latent):
        return Verdict("FAIL", (f"{axis}: what was fed again is not what was decoded", *details))
    return Verdict("PASS", (f"{axis}: 0 of {draws} diverged", *details))


def fed_details(finding: AxisFinding) -> tuple[str, ...]:
    """What tokens that were fed again showed, one by one, and which widths share their bits."""
    fed = finding.tokens
    if fed is None or not fed.n_tokens:
        return draft_details(finding)
    seen = (
        f"{finding.axis}: of {count(fed.n_tokens, 'token')} fed again, {fed.n_other_tokens} would "
        f"be others and {fed.n_other_bits} have other bits"
    )
    classes = [
        f"{'alone' if size == 1 else f'batch {size}'} {show_classes(found)}"
        for size, found in fed.width_classes
    ]
    alike = [f"width: passes of as many tokens have the same bits: {'; '.join(classes)}"]
    return (seen, *(alike if classes else ()), *draft_details(finding))


def draft_details(finding: AxisFinding) -> tuple[str, ...]:
    """How much of what a draft proposed was accepted, and at which widths that changed a token."""
    drafted = finding.drafted
    if drafted is None or drafted.mean_accepted_length is None:
        return ()
    seen = [
        f"draft: {drafted.n_accepted} of {count(drafted.n_proposed, 'proposed token')} accepted, "
        f"{drafted.mean_accepted_length:.2f} a pass (mean accepted length)"
    ]
    for what, widths in (
        ("another completion", drafted.widths_diverged),
        ("other bits", drafted.widths_latent),
    ):
        if widths:
            seen.append(f"draft: {what} by passes of {', '.join(map(str, widths))}")
    return tuple(seen)


def show_classes(classes: Sequence[Sequence[int]]) -> str:
    """``"1 | 2-4 | 5, 16"``: ranges of the widths that were tried."""
    tried = sorted(width for widths in classes for width in widths)
    shown = []
    for widths in classes:
        runs: list[list[int]] = []
        for width in widths:
            if runs and tried.index(width) == tried.index(runs[-1][-1]) + 1:
                runs[-1].append(width)
            else:
                runs.append([width])
        shown.append(", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs))
    return " | ".join(shown)


def _weaken(probe: ProbeVerdict, *doubts: str) -> ProbeVerdict:
    """A clean result that does not pass: what was clean is no reason for that."""
    if probe.verdict.outcome != "PASS":
        return probe
    return replace(probe, verdict=Verdict("INCONCLUSIVE", doubts))


def _lacks_control(probe: ProbeSummary) -> str | None:
    if probe.control.n_trials == 0:
        return "no control ran, so nothing shows that a divergence would have been seen"
    if probe.control.n_caught < probe.control.n_trials:
        is_empty = not any(completion.n_tokens for completion in probe.completions)
        why = " (an empty completion has no room for it)" * is_empty
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
        first = shorten(probe.first_error, MOST_OF_ERROR, placeholder=" ...")
        return f"samples that ended in an error: {probe.n_errors}; the first: {first}"
    return None


def _lacks_comparison(probe: ProbeSummary) -> str | None:
    if not probe.n_trials:
        return "no trial could be compared with the probe alone"
    return None


DOUBTS = (_has_errors, _lacks_comparison, _lacks_witness, _lacks_control)
"""Rules that keep a clean result from passing; each returns a reason or None."""


def _lacks_draws(probe: ProbeSummary, spec: RunSpec) -> str | None:
    """Are there too few draws to exclude the rate that the run was asked to exclude?"""
    if spec.target_rate is None:
        return None
    found: ProbeSummary | AxisFinding = probe
    if spec.axes == ("run-to-run",) and probe.axes:
        found = probe.axes[0]
    needed = trials_needed(spec.target_rate, spec.confidence)
    if found.n_draws >= needed:
        return None
    clean = count(needed, f"clean {found.draw}")
    return (
        f"to exclude a rate of {100 * spec.target_rate:g} % takes {clean}; there are "
        f"{found.n_draws}"
    )


def _lacks_draft(probe: ProbeSummary, spec: RunSpec) -> str | None:
    """Does a draft that was asked for leave it open what speculative decoding gives?"""
    drafted = next((f.drafted for f in probe.axes if f.drafted is not None), None)
    if spec.draft is None:
        return None
    if drafted is None or not drafted.n_proposed:
        return "draft: no token was proposed, so nothing was verified"
    if not drafted.n_accepted:
        n = count(drafted.n_proposed, "proposed token")
        return f"draft: 0 of {n} accepted, so every pass gave one token, as plain decoding does"
    if not probe.control.controls_draft:
        return "draft: no planted fault was caught there"
    return None


def probe_doubts(probe: ProbeSummary, spec: RunSpec) -> list[str]:
    """What keeps a clean result from passing, a sentence each."""
    doubts = [reason for check in DOUBTS if (reason := check(probe))]
    doubts += [
        f"{finding.axis}: no planted fault was caught there"
        for finding in probe.axes
        if finding.tokens and finding.n_trials and finding.axis not in probe.control.controlled
    ]
    doubts += [reason for check in (_lacks_draft, _lacks_draws) if (reason := check(probe, spec))]
    return doubts + list(probe.serving.doubts if probe.serving else ())


def worst(outcomes: list[Outcome]) -> Outcome:
    """FAIL over INCONCLUSIVE over PASS."""
    order: tuple[Outcome, ...] = ("FAIL", "INCONCLUSIVE", "PASS")
    return min(outcomes, key=order.index)
