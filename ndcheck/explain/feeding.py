"""The pass of a completion that is fed again in which a token was computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ndcheck.errors import UsageError
from ndcheck.samplers.local.batch import ExactBatch


@dataclass(frozen=True, slots=True)
class FedPass:
    """A pass of a completion that is fed: token ids [rows, columns], and which logits are wanted.

    Of its ``n_wanted`` last columns, number ``index`` gives the traced step's logits.
    """

    token_ids: Tensor
    n_wanted: int
    index: int


def advance(batch: ExactBatch, passes: Sequence[tuple[Tensor, int]], step: int) -> FedPass:
    """Run all passes before the one that gives the logits of ``step``, and return that.

    Raises UsageError where none does.
    """
    n_before = 0
    for token_ids, n_wanted in passes:
        if n_before + n_wanted > step:
            return FedPass(token_ids, n_wanted, step - n_before)
        batch.forward(token_ids, max(1, n_wanted))
        n_before += n_wanted
    raise UsageError(f"--step {step}: the completion has {n_before} tokens")
