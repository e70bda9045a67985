"""The divergence tree: a prefix trie of completions, reduced to the positions where they fork."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Branch:
    """One continuation at a fork: ``token_id`` None means that these completions end here.

    ``continuation`` is the decoded text from the fork to the next fork (or to the end).
    ``completion_ids`` are those below this branch, most frequent first.
    """

    token_id: int | None
    token_text: str
    count: int
    continuation: str
    completion_ids: tuple[int, ...]
    fork: Fork | None


@dataclass(frozen=True, slots=True)
class Fork:
    """A token position (0-based) where completions part; branches by count, largest first.

    ``margin`` is the smallest top-1 minus top-2 logit seen there on the most frequent branch.
    """

    position: int
    n_samples: int
    margin: float | None
    branches: tuple[Branch, ...]
