"""What a comparison with scores means: PASS, ACCEPTED, FAIL or INCONCLUSIVE, with the reasons."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ndcheck.errors import UsageError
from ndcheck.judging.verdict import Outcome, Verdict, count, worst
from ndcheck.scoring.comparing import Comparison
from ndcheck.scoring.completions import Recording
from ndcheck.scoring.scorers import Control


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


def judge(
    comparison: Comparison, recording: Recording, control: Control, limits: Limits
) -> Verdict:
    """FAIL over INCONCLUSIVE over PASS, over all limits and the evidence."""
    rulings = [*_rulings(comparison, recording, limits)]
    if worst([verdict.outcome for verdict in rulings]) != "FAIL":
        doubts = (*recording.doubts, *_doubts(comparison, control))
        rulings += [Verdict("INCONCLUSIVE", (doubt,)) for doubt in doubts]
    outcome = worst([verdict.outcome for verdict in rulings])
    reasons = [r for verdict in rulings if verdict.outcome == outcome for r in verdict.reasons]
    return Verdict(outcome, tuple(reasons), any(v.accepts_divergence for v in rulings))


def _rulings(comparison: Comparison, recording: Recording, limits: Limits) -> Iterator[Verdict]:
    accepts = comparison.n_differ > 0
    if limits.wants_bits:
        yield _judge_bits(comparison, recording)
    for limit, name, found in (
        (limits.max_logprob_difference, "log-probabilities differ by up to", "max_difference"),
        (limits.max_kl, "KL (k3) is", "k3_kl"),
    ):
        if limit is None:
            continue
        value = getattr(comparison, found)
        if value is None:
            yield Verdict("INCONCLUSIVE", ("no token was compared",))
            continue
        outcome: Outcome = "PASS" if value <= limit else "FAIL"
        reason = f"{name} {value:.3g} nats; at most {limit:g} accepted"
        yield Verdict(outcome, (reason,), accepts)


def _judge_bits(comparison: Comparison, recording: Recording) -> Verdict:
    n, at = comparison.n_differ, comparison.first_difference
    seen = f"{n} of {count(comparison.n_tokens, 'token')} differ"
    if at is None:
        n_distinct = f"{comparison.n_distinct} distinct"
        of = f"{count(len(comparison.completions), 'completion')}, {n_distinct}"
        return Verdict("PASS", (f"{seen}, of {of}",))
    for is_rounded, whose in (
        (recording.is_rounded, "recorded"),
        (comparison.is_rounded, "scored"),
    ):
        if is_rounded:
            why = f"the {whose} log-probabilities are rounded, so their bits cannot be compared"
            return Verdict("INCONCLUSIVE", (f"{why}: give --max-logprob-difference",))
    n_completions = f"{comparison.n_differing_completions} of {len(comparison.completions)}"
    return Verdict("FAIL", (f"{seen}, in {n_completions} completions, first at token {at + 1}",))


def _doubts(comparison: Comparison, control: Control) -> Iterator[str]:
    if not comparison.n_tokens:
        yield "no token was compared: the scorer returned nothing"
    if comparison.n_missing:
        yield f"{count(comparison.n_missing, 'completion')} without a score"
    if control == "missed":
        yield "the control was missed: another token in its place got the same log-probability"
    # Numbers that differ from the recorded ones are not those.
    if control == "absent" and comparison.n_tokens and not comparison.n_differ:
        yield (
            "these may be the recorded numbers themselves: score the control too, which is among "
            "what --requests FILE writes"
        )
