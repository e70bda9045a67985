"""The seam between a recording and whatever scores its tokens again, and the control of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ndcheck.errors import BackendError, UsageError
from ndcheck.scoring.completions import LOGPROB, Completion, TokenIds, read_file
from ndcheck.storage.run_directory import replacing, write_failure
from ndcheck.storage.scores import Control

Pair = tuple[TokenIds, TokenIds]
"""A prompt and a completion after it."""


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """Log-probabilities [T] in nats, and ranks [T] from 1 where the scorer gives them."""

    logprobs: NDArray[np.float64]
    ranks: NDArray[np.int64] | None = None


class Scorer(Protocol):
    """Computes the log-probabilities of tokens that were chosen before, alone and in one pass."""

    @property
    def title(self) -> str:
        """What computes, in a few words."""

    def score(self, prompt_ids: TokenIds, token_ids: TokenIds) -> Score | None:
        """Of each of ``token_ids`` after those before it; None where a file does not hold them.

        Raises UsageError where it cannot be asked for that, BackendError where it fails.
        """

    def close(self) -> None:
        """Let go of its connections and processes; it scores no more."""


def checked(
    logprobs: Sequence[float], ranks: Sequence[int], token_ids: TokenIds, scorer: str
) -> Score:
    """A score as it may be believed. Raises BackendError for one that cannot be one.

    ``ranks`` are all given or none.
    """
    if len(logprobs) != len(token_ids):
        raise BackendError(
            f"{scorer} gave {len(logprobs)} log-probabilities for {len(token_ids)} tokens"
        )
    for i, value in enumerate(logprobs):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or value not in LOGPROB:
            raise BackendError(f"{scorer} gave {value!r:.40} as log-probability of token {i + 1}")
    are_ranks = all(type(rank) is int and 1 <= rank < 2**31 for rank in ranks)
    if not are_ranks or len(ranks) not in (0, len(token_ids)):
        raise BackendError(f"{scorer} gave ranks that are none")
    found = np.array(ranks, dtype=np.int64) if ranks else None
    return Score(np.array(logprobs, dtype=np.float64), found)


class FileScorer:
    """Scores that something else computed, read from a file in the form of a recording."""

    def __init__(self, path: Path) -> None:
        self.title = str(path)
        self._scores: dict[Pair, Score] = {}
        for found in read_file(path):
            pair = found.prompt_ids, found.token_ids
            known = self._scores.setdefault(pair, Score(found.logprobs, found.ranks))
            if not np.array_equal(known.logprobs, found.logprobs):
                raise UsageError(
                    f"{path} {found.name}: other log-probabilities for the same ids than a line "
                    "before: give each completion once"
                )

    def score(self, prompt_ids: TokenIds, token_ids: TokenIds) -> Score | None:
        return self._scores.get((prompt_ids, token_ids))

    def close(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Scored:
    """What became of a recording: scores by prompt and completion, and of the control."""

    title: str
    scores: dict[Pair, Score]
    control: Control


def score_all(
    completions: Sequence[Completion],
    scorer: Scorer,
    on_progress: Callable[[int, int], None] = lambda n_done, n_all: None,
) -> Scored:
    """Score each distinct completion once, and the control.

    ``on_progress`` is told how many of how many are done. Raises what the scorer raises.
    """
    pairs = list(dict.fromkeys((c.prompt_ids, c.token_ids) for c in completions))
    scores: dict[Pair, Score] = {}
    for n_done, pair in enumerate(pairs, 1):
        found = scorer.score(*pair)
        if found is not None:
            scores[pair] = found
        on_progress(n_done, len(pairs))
    return Scored(scorer.title, scores, _run_control(completions, scores, scorer))


def altered(completions: Sequence[Completion]) -> tuple[Pair, Pair, int]:
    """The control: the longest completion, the same with another token, and the index of that.

    A computer gives the other token another log-probability; what repeats recorded numbers does
    not know it.
    """
    longest = max(completions, key=lambda completion: len(completion.token_ids))
    ids, at = longest.token_ids, len(longest.token_ids) // 2
    # One that the vocabulary holds.
    other = next(i for i in (*longest.prompt_ids, *ids, 0, 1) if i != ids[at])
    return (
        (longest.prompt_ids, ids),
        (longest.prompt_ids, (*ids[:at], other, *ids[at + 1 :])),
        at,
    )


def _run_control(
    completions: Sequence[Completion], scores: dict[Pair, Score], scorer: Scorer
) -> Control:
    original, planted, at = altered(completions)
    found = scorer.score(*planted)
    if found is None or original not in scores:
        return "absent"
    return "caught" if found.logprobs[at] != scores[original].logprobs[at] else "missed"


def write_requests(path: Path, completions: Sequence[Completion]) -> int:
    """What another program has to score, the control among it, a JSON object a line.

    Returns the number of lines. Raises BackendError if the disk refuses.
    """
    pairs = dict.fromkeys((c.prompt_ids, c.token_ids) for c in completions)
    pairs[altered(completions)[1]] = None
    try:
        with replacing(path) as file:
            for prompt_ids, token_ids in pairs:
                line = {"prompt_ids": prompt_ids, "completion_ids": token_ids}
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
    except OSError as error:
        raise write_failure(path, error) from error
    return len(pairs)
