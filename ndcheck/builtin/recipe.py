"""The recipe of a training run: every choice that, with the corpus, decides the weights."""

from dataclasses import dataclass, field
from typing import Any

from ndcheck.errors import UsageError


def choice(default: float, help: str) -> Any:
    """A field of the recipe, and the line that explains its option."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class Recipe:
    """The defaults made the shipped model."""

    seed: int = choice(0, "seed of the initial weights, the batches and the dropout")
    vocabulary_size: int = choice(4096, "tokens in the byte-level BPE vocabulary")
    layers: int = choice(4, "decoder layers")
    hidden_size: int = choice(256, "width of the residual stream")
    intermediate_size: int = choice(768, "width of the MLP")
    head_size: int = choice(64, "width of an attention head; two query heads share a key head")
    context_tokens: int = choice(2048, "length of a training window, and of the model's context")
    batch_rows: int = choice(16, "windows in a likelihood step")
    dropout: float = choice(0.15, "share of each block's output dropped while training")
    weight_decay: float = choice(0.1, "AdamW's weight decay, on matrices only")
    learning_rate: float = choice(3e-3, "peak learning rate of the likelihood stage")
    steps: int = choice(3000, "likelihood steps: predict the next token of the corpus")
    rounds: int = choice(120, "rounds against loops: write greedily, unlearn what repeats")
    round_rows: int = choice(128, "texts written in a round")
    round_tokens: int = choice(256, "tokens written for each text")
    round_steps: int = choice(4, "optimiser steps that share a round's texts")
    round_learning_rate: float = choice(7e-4, "learning rate of the first round; falls to zero")
    repeat_tokens: int = choice(4, "length of the n-grams that must not repeat")
    unlikelihood_weight: float = choice(0.0, "weight of a round's unlikelihood; imitation has 1")

    def __post_init__(self) -> None:
        """Refuses what would fail later with a longer message."""
        if self.hidden_size % (2 * self.head_size):
            raise UsageError("hidden size must be a multiple of twice the head size")
        if not 0 <= self.dropout < 1:
            raise UsageError("dropout must be in [0, 1)")
        if self.vocabulary_size < 300:
            raise UsageError("the vocabulary needs at least 300 tokens: 256 bytes and some merges")
        for name in ("layers", "head_size", "batch_rows", "round_steps", "repeat_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')} must be at least 1")
        if self.steps < 0 or self.rounds < 0 or self.steps + self.rounds == 0:
            raise UsageError("steps and rounds must not be negative, nor both zero")
        if self.round_tokens + 64 > self.context_tokens:
            raise UsageError("round tokens and a prompt of up to 64 must fit the context")
