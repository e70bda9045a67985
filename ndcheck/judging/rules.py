"""What a gate demands of a run: rules for all of it, for an arm, for a property; pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

from ndcheck.analysis.statistics import clopper_pearson, trials_needed
from ndcheck.analysis.summary import AxisFinding, ProbeSummary, Summary
from ndcheck.errors import UsageError
from ndcheck.judging.comparison import Comparison, FailOn, judge_comparison, unit
from ndcheck.judging.verdict import (
    STOCK_DID_NOT_FAIL,
    Outcome,
    Verdict,
    count,
    judge_axis,
    judge_divergence,
    judge_probe,
    judged_axes,
    probe_doubts,
    run_doubts,
    server_changes,
    servers_sampling,
    worst,
)
from ndcheck.records import AXES, Arm, Axis, Run, RunSpec

BASELINE_DEFAULT: tuple[FailOn, ...] = ("tokens", "unique", "rate")


@dataclass(frozen=True, slots=True)
class Rules:
    """Limits of one scope; None is unset.

    With none of the first three nothing may diverge. ``max_divergence_rate`` passes where the upper
    end of the two-sided interval at ``confidence`` is no higher, fails where its lower end is, and
    is inconclusive between; 0 asks that nothing diverged. Left unset, ``allow_latent`` is true
    where tokens may differ too, else what the run was asked for.
    """

    max_unique: int | None = None
    max_divergence_rate: float | None = None
    min_common_prefix: int | None = None
    allow_latent: bool | None = None
    confidence: float | None = None
    max_slowdown: float | None = None

    def over(self, wider: Rules) -> Rules:
        """These, and the wider scope's where unset."""
        own = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return replace(wider, **own)

    @property
    def given(self) -> tuple[str, ...]:
        """Those that are set, by name."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def tolerates_divergence(self) -> bool:
        """Is any of the limits on tokens given?"""
        limits = (self.max_unique, self.max_divergence_rate, self.min_common_prefix)
        return any(limit is not None for limit in limits)

    @property
    def allows_other_tokens(self) -> bool:
        return self.tolerates_divergence and self.max_unique != 1 and self.max_divergence_rate != 0


PROPERTY_RULES = ("max_divergence_rate", "min_common_prefix", "allow_latent", "confidence")
"""Those that one property can have; the others are about all completions of a probe."""


@dataclass(frozen=True, slots=True)
class RuleSet:
    """All rules of a check: the narrower scope wins over the wider, rule by rule.

    ``arms`` are those that must pass, None for all; an arm that only serves as the other's control
    may fail. ``baseline`` names a run that ``fail_on`` compares this one with. ``manifest`` is the
    file of one, whose bits this stack must have.
    """

    general: Rules = Rules()
    by_arm: Mapping[Arm, Rules] = field(default_factory=dict)
    by_property: Mapping[tuple[Arm | None, Axis], Rules] = field(default_factory=dict)
    arms: tuple[Arm, ...] | None = None
    baseline: str | None = None
    fail_on: tuple[FailOn, ...] = BASELINE_DEFAULT
    manifest: str | None = None

    def of_arm(self, arm: Arm) -> Rules:
        return self.by_arm.get(arm, Rules()).over(self.general)

    def of_property(self, arm: Arm, axis: Axis) -> Rules:
        """Only those that are given for the property itself."""
        general = self.by_property.get((None, axis), Rules())
        return self.by_property.get((arm, axis), Rules()).over(general)

    def check(self, spec: RunSpec) -> None:
        """Raise UsageError for a rule on what the run does not measure: it could not fail."""
        arms = {*self.by_arm, *(arm for arm, _ in self.by_property if arm), *(self.arms or ())}
        for arm in arms - set(spec.arms):
            raise UsageError(f"{arm}: the run has no such arm, only {', '.join(spec.arms)}")
        for _, axis in self.by_property:
            if axis not in spec.axes:
                raise UsageError(f"{axis}: not measured; the run has {', '.join(spec.axes)}")
        all_rules = (self.general, *self.by_arm.values(), *self.by_property.values())
        for rules in all_rules:
            _check_limits(rules, spec.decoding.max_tokens)
        judged = self.arms or spec.arms
        slowdowns = any(self.of_arm(arm).max_slowdown is not None for arm in judged)
        if slowdowns and not ("invariant" in judged and "stock" in spec.arms):
            raise UsageError(
                "max_slowdown: the invariant arm is compared with stock: run both with "
                "kernels = stock,invariant, and judge the invariant one"
            )


LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_unique": (lambda limit: limit >= 1, "give 1 or more"),
    "max_divergence_rate": (lambda limit: 0 <= limit < 1, "give a rate from 0 to below 1"),
    "min_common_prefix": (lambda limit: limit >= 1, "give 1 or more"),
    "confidence": (lambda limit: 0 < limit < 1, "give a level between 0 and 1, such as 0.95"),
    "max_slowdown": (lambda limit: 0 < limit < math.inf, "give a factor above 0, such as 1.5"),
}


def _check_limits(rules: Rules, max_tokens: int) -> None:
    for name, (is_fine, accepted) in LIMITS.items():
        limit = getattr(rules, name)
        if limit is not None and not is_fine(limit):
            raise UsageError(f"{name}: {limit} is out of range; {accepted}")
    if rules.min_common_prefix is not None and rules.min_common_prefix > max_tokens:
        raise UsageError(
            f"min_common_prefix: {rules.min_common_prefix} is more than a completion has; "
            f"give at most max_tokens, {max_tokens}"
        )


@dataclass(frozen=True, slots=True)
class Ruling:
    """What one rule said; ``axis`` and ``probe_id`` are None where it is about more than one."""

    rule: str
    arm: Arm | None
    probe_id: str | None
    axis: Axis | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """FAIL over INCONCLUSIVE over PASS, over all rulings; ACCEPTED where a limit let one pass."""

    outcome: Outcome
    rulings: tuple[Ruling, ...]

    @property
    def label(self) -> str:
        """The outcome as it is shown."""
        accepts = any(r.verdict.accepts_divergence for r in self.rulings)
        return Verdict(self.outcome, (), accepts).label

    @property
    def reasons(self) -> tuple[str, ...]:
        """Those of the rulings that decided, each once."""
        deciding = (r.verdict for r in self.rulings if r.verdict.outcome == self.outcome)
        return tuple(dict.fromkeys(reason for v in deciding for reason in v.reasons))


def judge_gate(
    run: Run,
    summary: Summary,
    rules: RuleSet,
    comparison: Comparison | None = None,
    manifest: Verdict | None = None,
) -> GateVerdict:
    """Every rule on every probe and judged arm. A PASS needs the evidence that `judge` asks for.

    What diverged in an arm that is not judged fails too, but for stock as the other's control.

    ``comparison`` is of the baseline (A) with this run (B), where the rules name a baseline;
    ``manifest`` the verdict on this stack, where they name a manifest.
    """
    rulings = list(_judge_run(run, summary, rules, comparison))
    if rules.manifest is not None:
        if manifest is None:
            raise ValueError("the rules name a manifest, so a verdict on this stack is needed")
        rulings.append(Ruling("manifest", None, None, None, manifest))
    judged = rules.arms or run.spec.arms
    probes = [probe for probe in summary.probes if probe.arm in judged]
    for probe in probes:
        stock = next(
            (p for p in summary.probes if p.arm == "stock" and p.probe_id == probe.probe_id), None
        )
        rulings += _judge_probe(probe, stock, run, rules)
    for probe in summary.probes:
        if probe.arm not in judged and not (probe.arm == "stock" and "invariant" in judged):
            rulings += _judge_other_arm(probe, run.spec, rules)
    if not probes:
        verdict = Verdict("INCONCLUSIVE", ("no sample was taken",))
        rulings.append(Ruling("evidence", None, None, None, verdict))
    return GateVerdict(worst([r.verdict.outcome for r in rulings]), tuple(rulings))


def _judge_run(
    run: Run, summary: Summary, rules: RuleSet, comparison: Comparison | None
) -> Iterator[Ruling]:
    doubts = (*run_doubts(run), *server_changes(summary))
    if doubts:
        yield Ruling("evidence", None, None, None, Verdict("INCONCLUSIVE", doubts))
    if known := servers_sampling(run.spec):
        yield Ruling("sampling", None, None, None, Verdict("PASS", known))
    if rules.baseline is None:
        return
    confidence = rules.general.confidence or run.spec.confidence
    if comparison is None:
        raise ValueError("the rules name a baseline, so a comparison with it is needed")
    for name, verdict in judge_comparison(comparison, rules.fail_on, confidence).items():
        yield Ruling(f"baseline-{name}", None, None, None, verdict)


def _judge_other_arm(probe: ProbeSummary, spec: RunSpec, rules: RuleSet) -> Iterator[Ruling]:
    latent = _allows_latent(rules.of_arm(probe.arm), spec)
    verdict = judge_divergence(probe, allow_latent=latent)
    if verdict.outcome == "FAIL":
        yield Ruling("divergence", probe.arm, probe.probe_id, None, verdict)


def _judge_probe(
    probe: ProbeSummary, stock: ProbeSummary | None, run: Run, rules: RuleSet
) -> Iterator[Ruling]:
    own, spec, by_text = rules.of_arm(probe.arm), run.spec, unit(run) == "character"

    def ruling(rule: str, verdict: Verdict, axis: Axis | None = None) -> Ruling:
        return Ruling(rule, probe.arm, probe.probe_id, axis, verdict)

    yield ruling("evidence", _judge_evidence(probe, stock, spec, own))
    findings = {finding.axis: finding for finding in probe.axes}
    for axis in judged_axes(probe, spec):
        narrow = rules.of_property(probe.arm, axis)
        verdict = _judge_property(axis, findings.get(axis), spec, own, narrow, by_text=by_text)
        yield ruling("property", verdict, axis)
    yield ruling("divergence", _judge_divergence(probe, spec, own, rules))
    if own.max_unique is not None:
        yield ruling("max_unique", _judge_unique(probe, own.max_unique))
    if own.max_divergence_rate is not None:
        confidence = own.confidence or spec.confidence
        verdict = _judge_rate(probe, own.max_divergence_rate, confidence)
        yield ruling("max_divergence_rate", verdict)
    if own.min_common_prefix is not None:
        verdict = _judge_prefix(
            *(probe.common_prefix_tokens, probe.n_unique > 1, own.min_common_prefix),
            by_text=by_text,
        )
        yield ruling("min_common_prefix", verdict)
    if own.max_slowdown is not None and probe.arm == "invariant":
        yield ruling("max_slowdown", _judge_slowdown(probe.slowdown_vs_stock, own.max_slowdown))


def _judge_evidence(
    probe: ProbeSummary, stock: ProbeSummary | None, spec: RunSpec, rules: Rules
) -> Verdict:
    doubts = probe_doubts(probe, spec)
    control = "the planted fault was caught"
    if probe.arm == "invariant" and stock is not None:
        asked = replace(spec, allow_latent=_allows_latent(rules, spec))
        if judge_probe(stock, asked).verdict.outcome == "FAIL":
            control += ", and stock, the other control, failed"
        else:
            doubts.append(STOCK_DID_NOT_FAIL)
    if doubts:
        return Verdict("INCONCLUSIVE", tuple(doubts))
    return Verdict(
        "PASS", (f"{count(probe.n_trials, 'trial')}, each witnessed at its size; {control}",)
    )


def _judge_divergence(probe: ProbeSummary, spec: RunSpec, own: Rules, rules: RuleSet) -> Verdict:
    """Over every comparison; what a property has limits of its own for is judged there."""
    narrow = [rules.of_property(probe.arm, axis) for axis in AXES]
    on_axis = any(finding.diverged_trials for finding in probe.axes)
    by_axis = on_axis and any(limits.tolerates_divergence for limits in narrow)
    return judge_divergence(
        probe,
        allow_tokens=own.allows_other_tokens or by_axis,
        allow_latent=_allows_latent(own, spec) or any(limits.allow_latent for limits in narrow),
    )


def _judge_property(
    axis: Axis,
    finding: AxisFinding | None,
    spec: RunSpec,
    own: Rules,
    narrow: Rules,
    *,
    by_text: bool,
) -> Verdict:
    """``own`` are the rules of the probe, which a property of many trials need not meet alone."""
    asked = replace(spec, allow_latent=_allows_latent(narrow.over(own), spec))
    if finding is None or not finding.n_trials:
        return judge_axis(axis, finding, asked)
    verdicts = []
    if narrow.max_divergence_rate is not None:
        confidence = narrow.confidence or own.confidence or spec.confidence
        verdicts.append(_judge_rate(finding, narrow.max_divergence_rate, confidence))
    if narrow.min_common_prefix is not None:
        at = finding.first_divergence_min
        limit = narrow.min_common_prefix
        verdicts.append(_judge_prefix(at or 0, at is not None, limit, by_text=by_text))
    if not verdicts and finding.diverged_trials and own.tolerates_divergence:
        reason = f"{_seen(finding)}; judged by the rules on all trials"
        verdicts.append(Verdict("PASS", (reason,), accepts_divergence=True))
    if not verdicts:
        return judge_axis(axis, finding, asked)
    # Tokens that are fed again count with those that diverged.
    fed = None if finding.diverged_trials else finding.tokens
    bits = judge_axis(axis, replace(finding, diverged_trials=0, tokens=fed), asked)
    if bits.outcome != "PASS":
        return bits
    outcome = worst([v.outcome for v in verdicts])
    reasons = [reason for v in verdicts if v.outcome == outcome for reason in v.reasons]
    accepts = any(v.accepts_divergence for v in verdicts)
    return Verdict(outcome, tuple(f"{axis}: {reason}" for reason in reasons), accepts)


def _allows_latent(rules: Rules, spec: RunSpec) -> bool:
    if rules.allow_latent is not None:
        return rules.allow_latent
    return rules.allows_other_tokens or spec.allow_latent


def _judge_unique(probe: ProbeSummary, limit: int) -> Verdict:
    unique = count(probe.n_unique, "unique completion")
    reason = f"{unique} of {probe.n_samples}; at most {limit} accepted"
    if not probe.n_samples:
        return Verdict("INCONCLUSIVE", (reason,))
    accepts = probe.n_unique > 1
    return Verdict("PASS" if probe.n_unique <= limit else "FAIL", (reason,), accepts)


def _seen(found: ProbeSummary | AxisFinding) -> str:
    if isinstance(found, AxisFinding):
        n, diverged, _ = found.shown
        return f"{diverged} of {count(n, found.draw)} diverged"
    return f"{found.diverged_draws} of {count(found.n_draws, found.draw)} diverged"


def _judge_rate(found: ProbeSummary | AxisFinding, limit: float, confidence: float) -> Verdict:
    seen = _seen(found)
    if not found.n_draws:
        return Verdict("INCONCLUSIVE", (seen,))
    if limit == 0:
        outcome: Outcome = "FAIL" if found.diverged_trials else "PASS"
        return Verdict(outcome, (f"{seen}; none accepted",))
    low, high = clopper_pearson(found.diverged_draws, found.n_draws, confidence)
    is_property = isinstance(found, AxisFinding)
    reason = (
        f"{seen}: at {100 * confidence:g} % the rate is within {100 * low:.3g}-{100 * high:.3g} %; "
        f"at most {100 * limit:g} % accepted"
    )
    if high <= limit:
        return Verdict("PASS", (reason,), accepts_divergence=found.diverged_trials > 0)
    if low > limit:
        return Verdict("FAIL", (reason,))
    if not found.diverged_trials:
        clean = count(trials_needed(limit, confidence), f"clean {found.draw}")
        # The rate that a plan is made for is that of all its trials.
        how = "more samples, or loads" if is_property else f"target_rate = {limit:g}"
        reason += f", which takes {clean} to show ({how})"
    return Verdict("INCONCLUSIVE", (reason,))


def _judge_prefix(n_common: int, has_forked: bool, limit: int, *, by_text: bool) -> Verdict:
    """``n_common`` characters where the server gave text alone: up to four tokens, a byte each."""
    if not has_forked:
        return Verdict("PASS", ("the completions do not part",))
    seen = count(n_common, "common character" if by_text else "common token")
    reason = f"the completions part after {seen}; at least {limit} {'tokens ' * by_text}asked for"
    if by_text and 4 * n_common >= limit:
        return Verdict("INCONCLUSIVE", (f"{reason}, which text alone does not tell",))
    return Verdict("PASS" if n_common >= limit else "FAIL", (reason,), accepts_divergence=True)


def _judge_slowdown(slowdown: float | None, limit: float) -> Verdict:
    if slowdown is None:
        return Verdict("INCONCLUSIVE", ("no load was timed in both arms",))
    reason = f"{slowdown:.3g} times the time of stock; at most {limit:g} accepted"
    return Verdict("PASS" if slowdown <= limit else "FAIL", (reason,))
