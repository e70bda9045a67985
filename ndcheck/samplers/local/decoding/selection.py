"""From logits to tokens, and what is kept of the logits: all of it independent of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ndcheck.records import Decoding, Fault


class Reading(NamedTuple):
    """What one decode step gave each row, all [B].

    ``token_ids`` int64; ``margins`` fp32, the largest logit minus the next, NaN if the row holds
    NaN; ``logprobs`` fp32, of the chosen token; ``digests`` int64, over the bits of the row.
    """

    token_ids: Tensor
    margins: Tensor
    logprobs: Tensor
    digests: Tensor


def read_step(
    logits_B_V: Tensor,
    decoding: Decoding,
    noise: Tensor | None,
    rows: Sequence[int] | None = None,
) -> Reading:
    """Choose every row's token and read the rest off its logits.

    On a CPU, where that takes longer than the choice, off those of ``rows`` alone, if given; other
    rows have NaN and 0 for it.

    ``noise`` [V] (fp64) comes from `gumbel_noise` where a temperature asks for a draw. A row's
    reading cannot depend on the rows beside it: comparisons and digests are exact in any order,
    and the log-probability is summed row by row. Ties go to the lowest id.
    """
    if logits_B_V.is_cuda:
        from ndcheck_kernels.cuda.rows.logits import read_logits

        token_ids, margins, sums, digests = read_logits(logits_B_V)
        if noise is not None:
            token_ids = choose_tokens(logits_B_V, decoding.temperature, noise)
        chosen = logits_B_V.gather(-1, token_ids[:, None])[:, 0].float()
        return Reading(token_ids, margins, chosen - sums, digests)
    token_ids = choose_tokens(logits_B_V, decoding.temperature, noise)
    if rows is None or len(rows) == len(logits_B_V):
        return Reading(token_ids, *_read_rows(logits_B_V, token_ids))
    index = torch.tensor(rows)
    found = _read_rows(logits_B_V[index], token_ids[index])
    blanks = (torch.full(token_ids.shape, torch.nan) for _ in range(2))
    for values, part in zip(whole := (*blanks, torch.zeros_like(token_ids)), found, strict=True):
        values[index] = part
    return Reading(token_ids, *whole)


def read_pass(logits_B_n_V: Tensor, decoding: Decoding, rows: Sequence[int]) -> Reading:
    """`read_step`, without noise, of all positions at once: each value [n, B]."""
    n_rows, n_positions, _ = logits_B_n_V.shape
    places = [row * n_positions + nth for row in rows for nth in range(n_positions)]
    reading = read_step(logits_B_n_V.flatten(0, 1), decoding, None, places)
    return Reading(*(values.view(n_rows, n_positions).T for values in reading))


def _read_rows(logits_B_V: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Margins, log-probabilities and digests of a `Reading`, on a CPU."""
    wide = logits_B_V.float()
    logprobs = log_softmax(wide).gather(-1, token_ids[:, None])[:, 0]
    return _margins(wide.numpy()), logprobs, _digest_rows(logits_B_V)


def _margins(logits_B_V: np.ndarray) -> Tensor:
    rows, first = np.arange(len(logits_B_V)), logits_B_V.argmax(-1)
    top = logits_B_V[rows, first]
    logits_B_V[rows, first] = -np.inf
    # NaN counts as the largest, so a row that holds it has it here.
    with np.errstate(invalid="ignore"):
        margins = top - logits_B_V.max(-1)
    logits_B_V[rows, first] = top  # Of fp32 logits it is the model's own memory.
    return torch.from_numpy(margins)


def log_softmax(logits_B_V: Tensor) -> Tensor:
    """Of fp32 logits on a CPU, each row's as if it were alone."""
    from ndcheck_kernels import active_scope

    if active_scope() is not None:
        return logits_B_V.log_softmax(-1)
    # Each row on a copy of its own: this reduction must not itself depend on the batch.
    return torch.stack([row.clone().log_softmax(-1) for row in logits_B_V])


def choose_tokens(logits_B_V: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """Token ids [B] (int64): the largest logit, or the largest of logit / temperature + noise."""
    if noise is None:
        return lowest_argmax(logits_B_V)
    return lowest_argmax(logits_B_V.double() / temperature + noise)


def lowest_argmax(scores_B_V: Tensor) -> Tensor:
    """Index of the largest score in each row, the lowest index where several are equal: [B]."""
    if not scores_B_V.is_cuda:
        wide = scores_B_V if scores_B_V.dtype == torch.float64 else scores_B_V.float()
        return torch.from_numpy(wide.numpy().argmax(-1))  # The first of several, numpy promises.
    ids = torch.arange(scores_B_V.shape[-1], device=scores_B_V.device)
    is_top = scores_B_V == scores_B_V.amax(dim=-1, keepdim=True)
    return torch.where(is_top, ids, ids.numel() - 1).amin(dim=-1)


def gumbel_noise(seed: int, position: int, n_vocabulary: int) -> Tensor:
    """Gumbel(0, 1) draws [n_vocabulary] (fp64), the same on every machine.

    The argmax of ``logits / temperature + noise`` is a draw from the softmax (Gumbel-max trick;
    Maddison, Tarlow and Minka 2014).
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))
    return torch.from_numpy(generator.gumbel(size=n_vocabulary))


def digest_row(logits_V: Tensor) -> int:
    """A signed 64-bit digest of one row's bits: that of `cuda.rows.logits`, by numpy."""
    return int(_digest_rows(logits_V[None])[0])


def _digest_rows(logits_B_V: Tensor) -> Tensor:
    width, dtype = ((torch.int16, np.uint16), (torch.int32, np.uint32))[
        logits_B_V.element_size() == 4
    ]
    bits = logits_B_V.contiguous().view(width).cpu().numpy().view(dtype).astype(np.uint32)
    h = bits ^ _salts(bits.shape[-1])  # [2, B, V]
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    high, low = h.sum(axis=-1, dtype=np.uint32).astype(np.uint64)
    return torch.from_numpy((high << np.uint64(32) | low).view(np.int64))


@lru_cache(maxsize=1)
def _salts(n_vocabulary: int) -> np.ndarray:
    """[2, 1, V]: a number of its own for each place, for either half of a digest."""
    index = np.arange(n_vocabulary, dtype=np.uint32) * np.uint32(0x9E3779B1)
    return np.stack((index, index + np.uint32(0x7F4A7C15)))[:, None]


def plant_in_logits(
    logits_B_V: Tensor,
    position: int,
    fault: Fault | None,
    decoding: Decoding,
    noise: Tensor | None,
) -> Tensor:
    """The logits with the control's fault: one unit in the last place, or another token drawn.

    ``decoding`` and ``noise`` are those that `read_step` will choose by.
    """
    if fault is None or position not in (fault.latent_at, fault.fork_at):
        return logits_B_V
    logits_B_V = logits_B_V.clone()
    rows = torch.arange(logits_B_V.shape[0], device=logits_B_V.device)
    drawn = choose_tokens(logits_B_V, decoding.temperature, noise)
    if position == fault.fork_at:
        logits_B_V[rows, drawn] = -torch.inf
    else:
        logit = logits_B_V[rows, drawn]
        logits_B_V[rows, drawn] = torch.nextafter(logit, torch.full_like(logit, torch.inf))
    return logits_B_V
