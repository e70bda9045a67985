"""What fillers say: plain English words, drawn from a seed."""

from __future__ import annotations

import random

FILLER_TEXT = (
    "the quick answer depends on order because floating point addition is not associative and "
    "every kernel may split its sums in another way when more requests arrive at once so a "
    "model that looks certain can still choose another word after a hundred tokens while "
    "nobody changed its weights its prompt or its settings only who else was waiting in line"
)
FILLER_WORDS = FILLER_TEXT.split()


def filler_text(seed: int, n_words: int) -> str:
    """Plain English words, a function of ``seed`` alone: the prompt of a filler."""
    return " ".join(random.Random(seed).choices(FILLER_WORDS, k=n_words))


def fit_to_length(token_ids: list[int], length: int) -> list[int]:
    """Cut or repeat ``token_ids`` to exactly ``length`` tokens."""
    repeats = -(-length // len(token_ids))
    return (token_ids * repeats)[:length]
