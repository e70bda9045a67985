"""What a gate demands of log-probabilities that were scored again; pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from ndcheck.errors import UsageError
from ndcheck.judging.rules import GateVerdict, Ruling
from ndcheck.judging.verdict import Outcome, Verdict, count, worst
from ndcheck.storage.scores import ArmScore, ScoreSummary


@dataclass(frozen=True, slots=True)
class Limits:
    """What is accepted. With no limit given, no bit may differ, and ``bitwise`` asks for that.

    ``max_logprob_difference`` is in nats, of any token; ``max_kl`` is of the k3 estimator, in nats
    a token. Raises UsageError for a limit that is none.
    """

    bitwise: bool = False
    max_logprob_difference: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_logprob_difference", "max_kl"):
            limit = getattr(self, name)
            if limit is not None and not 0 <= limit < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} {limit}: give nats, 0 or more")

    @property
    def wants_bits(self) -> bool:
        return self.bitwise or (self.max_logprob_difference is None and self.max_kl is None)

    @property
    def given(self) -> tuple[str, ...]:
        """Those that are set, by name."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) not in (None, False))

    @property
    def flags(self) -> str:
        """What asks for them on a command line, with a space before each."""
        return "".join(
            f" --{name.replace('_', '-')}" + (f" {value!r}" if value is not True else "")
            for name in self.given
            for value in [getattr(self, name)]
        )

    def over(self, wider: Limits) -> Limits:
        """These, and the wider ones where unset."""
        difference, kl = self.max_logprob_difference, self.max_kl
        return Limits(
            self.bitwise or wider.bitwise,
            wider.max_logprob_difference if difference is None else difference,
            wider.max_kl if kl is None else kl,
        )


def judge_score(score: ScoreSummary, limits: Limits) -> GateVerdict:
    """Every limit on every arm, and the evidence: FAIL over INCONCLUSIVE over PASS."""
    rulings = [ruling for found in score.arms for ruling in _rulings(found, score, limits)]
    return GateVerdict(worst([r.verdict.outcome for r in rulings]), tuple(rulings))


def judge_arm(found: ArmScore, score: ScoreSummary, limits: Limits) -> Verdict:
    """The same of one arm, as one verdict."""
    verdicts = [
        ruling.verdict
        for ruling in _rulings(found, score, limits)
        if ruling.rule != "evidence" or ruling.verdict.outcome != "PASS"
    ]
    outcome = worst([verdict.outcome for verdict in verdicts])
    reasons = [r for verdict in verdicts if verdict.outcome == outcome for r in verdict.reasons]
    return Verdict(outcome, tuple(reasons), any(v.accepts_divergence for v in verdicts))


def _rulings(found: ArmScore, score: ScoreSummary, limits: Limits) -> Iterator[Ruling]:
    def ruling(rule: str, verdict: Verdict) -> Ruling:
        return Ruling(rule, found.arm, None, None, verdict)

    accepts = found.n_differ > 0
    if limits.wants_bits:
        yield ruling("bitwise", _judge_bits(found, score))
    for rule, name, value in (
        ("max_logprob_difference", "log-probabilities differ by up to", found.max_difference),
        ("max_kl", "KL (k3) is", found.k3_kl),
    ):
        limit = getattr(limits, rule)
        if limit is None:
            continue
        if value is None:
            yield ruling(rule, Verdict("INCONCLUSIVE", ("no token was compared",)))
            continue
        outcome: Outcome = "PASS" if value <= limit else "FAIL"
        reason = f"{name} {value:.3g} nats; at most {limit:g} accepted"
        yield ruling(rule, Verdict(outcome, (reason,), accepts))
    doubts = (*score.doubts, *_doubts(found, score))
    seen = f"{count(found.n_tokens, 'token')} of {count(found.n_completions, 'completion')} scored"
    evidence = Verdict("PASS", (seen,))
    yield ruling("evidence", Verdict("INCONCLUSIVE", doubts) if doubts else evidence)


def _judge_bits(found: ArmScore, score: ScoreSummary) -> Verdict:
    n, at = found.n_differ, found.first_difference
    seen = f"{n} of {count(found.n_tokens, 'token')} differ"
    for is_rounded, whose in ((score.is_rounded, "recorded"), (found.is_rounded, "scored")):
        if is_rounded:
            why = f"the {whose} log-probabilities are rounded, so their bits cannot be compared"
            return Verdict("INCONCLUSIVE", (f"{why}: give --max-logprob-difference",))
    if at is None:
        of = f"{count(found.n_completions, 'completion')}, {found.n_distinct} distinct"
        return Verdict("PASS", (f"{seen}, of {of}",))
    n_completions = f"{found.n_differing_completions} of {found.n_completions}"
    return Verdict("FAIL", (f"{seen}, in {n_completions} completions, first at token {at + 1}",))


def _doubts(found: ArmScore, score: ScoreSummary) -> Iterator[str]:
    if not found.n_tokens:
        yield "no token was compared: the scorer returned nothing"
    if found.n_missing:
        yield f"{count(found.n_missing, 'completion')} without a score"
    if score.control == "missed":
        yield "the control was missed: another token in its place got the same log-probability"
    # Numbers that differ from the recorded ones are not those.
    if score.control == "absent" and found.n_tokens and not found.n_differ:
        yield (
            "these may be the recorded numbers themselves: score the control too, which is among "
            "what --requests FILE writes"
        )
