"""From logits to tokens, and what is kept of the logits: all of it independent of the batch."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from ndcheck.records import Decoding, Fault, FinishReason


def choose_tokens(logits_B_V: Tensor, position: int, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Token ids [B] (int64), and margins [B] (fp32): the largest logit minus the next.

    Only exact operations touch the logits (comparison, and fp64 where a temperature asks for
    it), so a row's choice cannot depend on the rows beside it. Ties go to the lowest id.
    """
    top2 = torch.topk(logits_B_V, 2, dim=-1).values.float()
    scores = logits_B_V
    if decoding.temperature > 0:
        noise = gumbel_noise(decoding.seed, position, logits_B_V.shape[-1])
        scores = logits_B_V.double() / decoding.temperature + noise.to(logits_B_V.device)
    return lowest_argmax(scores), top2[:, 0] - top2[:, 1]


def lowest_argmax(scores_B_V: Tensor) -> Tensor:
    """Index of the largest score in each row, the lowest index where several are equal: [B]."""
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


def digest_row(logits_V: Tensor) -> str:
    """16 hexadecimal digits over the bits of one row of logits."""
    bits = logits_V.contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(bits.data, digest_size=8).hexdigest()


def plant(logits_B_V: Tensor, position: int, fault: Fault) -> Tensor:
    """The logits with the control's fault: one unit in the last place, or a swapped winner."""
    if position not in (fault.latent_at, fault.fork_at):
        return logits_B_V
    logits_B_V = logits_B_V.clone()
    rows = torch.arange(logits_B_V.shape[0], device=logits_B_V.device)
    winner = lowest_argmax(logits_B_V)
    if position == fault.fork_at:
        logits_B_V[rows, winner] = -torch.inf
    else:
        top = logits_B_V[rows, winner]
        logits_B_V[rows, winner] = torch.nextafter(top, torch.full_like(top, torch.inf))
    return logits_B_V


class Stream:
    """What one probe row has generated so far."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.margins: list[float] = []
        self.row_digests: list[str] = []
        self.finish_reason: FinishReason = "length"

    @property
    def is_finished(self) -> bool:
        return self.finish_reason == "stop"

    def record(self, logits_V: Tensor, token_id: int, margin: float, stop_ids: set[int]) -> None:
        if self.is_finished:
            return
        # Row by row, on a copy of its own: this reduction must not itself depend on the batch.
        logits_V = logits_V.clone()
        self.token_ids.append(token_id)
        self.logprobs.append(float(torch.log_softmax(logits_V.float(), dim=-1)[token_id]))
        self.margins.append(margin)
        self.row_digests.append(digest_row(logits_V))
        if token_id in stop_ids:
            self.finish_reason = "stop"
