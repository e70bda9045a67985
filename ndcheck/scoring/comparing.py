"""Recorded log-probabilities against scored ones, token by token; pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ndcheck.analysis.statistics import k1_kl, k3_kl
from ndcheck.records import Arm
from ndcheck.scoring.completions import Completion, Recording, rounded
from ndcheck.scoring.scorers import Scored
from ndcheck.storage.scores import ArmScore, ScoreSummary, finite

PERCENTILES = (1, 5, 50, 95, 99)
CLIP = (0.8, 1.2)
"""Importance ratios outside are clipped by PPO at its usual epsilon of 0.2."""


@dataclass(frozen=True, slots=True, eq=False)
class CompletionFinding:
    """One recorded completion against its score; indices count tokens from 0.

    ``difference`` [T] is scored minus recorded, in nats, ``differs`` [T] whether the two are other
    fp32 numbers (0 and -0 are one). ``rank_changes`` [T]: None where a rank is not known.
    """

    completion: Completion
    scored: NDArray[np.float64]
    ranks: NDArray[np.int64] | None
    difference: NDArray[np.float64]
    differs: NDArray[np.bool_]
    rank_changes: NDArray[np.bool_] | None

    @property
    def first_difference(self) -> int | None:
        return _first(self.differs)

    @property
    def parts_at(self) -> int | None:
        """Where greedy decoding by the scorer would have left the recorded text.

        None where it would not, or was not greedy: there other ranks choose no other token.
        """
        greedy = self.completion.ranks is not None and bool((self.completion.ranks == 1).all())
        return _first(self.ranks != 1) if greedy and self.ranks is not None else None


@dataclass(frozen=True, slots=True, eq=False)
class ByPosition:
    """Over completions, at each index from 0, all [longest completion]."""

    n: NDArray[np.int64]
    n_differ: NDArray[np.int64]
    mean_difference: NDArray[np.float64]
    """Of its absolute value, as the next."""
    max_difference: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """All recorded completions of an arm, or of a file, against their scores.

    Every sample counts, also where others have its ids. Differences are in nats; KL is of recorded
    against scored, in nats a token, and the importance ratio is scored over recorded probability.
    ``n_missing`` completions have no score. What is None is not known.
    """

    arm: Arm | None
    completions: tuple[CompletionFinding, ...]
    n_missing: int
    n_distinct: int
    n_tokens: int
    n_differ: int
    first_difference: int | None
    """The least index over completions."""
    n_differing_completions: int
    max_difference: float | None
    mean_difference: float | None
    k1_kl: float | None
    k3_kl: float | None
    ratio_percentiles: tuple[float, ...]
    """At PERCENTILES, each the ratio of a token (nearest rank); empty without a token."""
    n_outside_clip: int
    n_ranked: int
    """Tokens whose rank is known on both sides."""
    n_rank_changes: int
    n_parted: int
    """Greedy completions that the scorer's own best tokens leave."""
    first_parting: int | None
    is_rounded: bool
    """Do the scores hold fewer digits than fp32?"""
    by_position: ByPosition


def compare(completions: Sequence[Completion], scored: Scored) -> Iterator[Comparison]:
    """One for each arm, in the order in which they appear."""
    for arm in dict.fromkeys(completion.arm for completion in completions):
        yield _compare([c for c in completions if c.arm == arm], scored, arm)


def summarise(
    recording: Recording, scored: Scored, comparisons: Sequence[Comparison]
) -> ScoreSummary:
    """As much of the comparisons as is judged, and kept."""
    arms = tuple(
        ArmScore(
            arm=found.arm,
            n_completions=len(found.completions),
            n_distinct=found.n_distinct,
            n_missing=found.n_missing,
            n_tokens=found.n_tokens,
            n_differ=found.n_differ,
            n_differing_completions=found.n_differing_completions,
            first_difference=found.first_difference,
            max_difference=finite(found.max_difference),
            k3_kl=finite(found.k3_kl),
            is_rounded=found.is_rounded,
        )
        for found in comparisons
    )
    return ScoreSummary(
        *(recording.source, scored.title, scored.control),
        *(recording.is_rounded, recording.doubts, arms),
    )


def _compare(completions: Sequence[Completion], scored: Scored, arm: Arm | None) -> Comparison:
    found = [x for completion in completions if (x := _find(completion, scored)) is not None]
    recorded, scores, difference = (
        np.concatenate([np.zeros(0), *parts])
        for parts in (
            [x.completion.logprobs for x in found],
            [x.scored for x in found],
            [x.difference for x in found],
        )
    )
    n_tokens = len(difference)
    # A log-probability of -1e9 against one near 0 is an infinite ratio, which is as it should be.
    with np.errstate(over="ignore"):
        ratios = np.exp(difference)
        k3 = k3_kl(recorded, scores) if n_tokens else None
    by_position = _by_position(found)
    rank_changes = [x.rank_changes for x in found if x.rank_changes is not None]
    firsts = [at for x in found if (at := x.first_difference) is not None]
    partings = [at for x in found if (at := x.parts_at) is not None]
    return Comparison(
        arm=arm,
        completions=tuple(found),
        n_missing=len(completions) - len(found),
        n_distinct=len({(x.completion.prompt_ids, x.completion.token_ids) for x in found}),
        n_tokens=n_tokens,
        n_differ=int(by_position.n_differ.sum()),
        first_difference=min(firsts, default=None),
        n_differing_completions=len(firsts),
        max_difference=float(np.abs(difference).max()) if n_tokens else None,
        mean_difference=float(np.abs(difference).mean()) if n_tokens else None,
        k1_kl=k1_kl(recorded, scores) if n_tokens else None,
        k3_kl=k3,
        ratio_percentiles=_percentiles(ratios),
        n_outside_clip=int(((ratios < CLIP[0]) | (ratios > CLIP[1])).sum()),
        n_ranked=sum(map(len, rank_changes)),
        n_rank_changes=int(sum(changes.sum() for changes in rank_changes)),
        n_parted=len(partings),
        first_parting=min(partings, default=None),
        is_rounded=rounded([x.scored for x in found]),
        by_position=by_position,
    )


def _find(completion: Completion, scored: Scored) -> CompletionFinding | None:
    score = scored.scores.get((completion.prompt_ids, completion.token_ids))
    if score is None:
        return None
    rank_changes = None
    if completion.ranks is not None and score.ranks is not None:
        rank_changes = completion.ranks != score.ranks
    return CompletionFinding(
        completion,
        score.logprobs,
        score.ranks,
        score.logprobs - completion.logprobs,
        score.logprobs.astype(np.float32) != completion.logprobs.astype(np.float32),
        rank_changes,
    )


def _percentiles(ratios: NDArray[np.float64]) -> tuple[float, ...]:
    if not ratios.size:
        return ()
    # Of one token each: there is nothing between two infinite ratios.
    return tuple(np.percentile(ratios, PERCENTILES, method="inverted_cdf").tolist())


def _by_position(found: Sequence[CompletionFinding]) -> ByPosition:
    length = max((len(x.difference) for x in found), default=0)
    n, n_differ = np.zeros((2, length), dtype=np.int64)
    total, largest = np.zeros((2, length))
    for x in found:
        size = np.abs(x.difference)
        n[: len(size)] += 1
        n_differ[: len(size)] += x.differs
        total[: len(size)] += size
        largest[: len(size)] = np.maximum(largest[: len(size)], size)
    return ByPosition(n, n_differ, total / np.maximum(n, 1), largest)


def _first(where: NDArray[np.bool_]) -> int | None:
    return int(where.argmax()) if where.any() else None
