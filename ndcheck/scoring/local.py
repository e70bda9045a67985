"""Scoring by a model in this process: prompt and completion in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ndcheck.errors import BackendError, first_line
from ndcheck.records import Arm
from ndcheck.samplers.local.decoding.selection import log_softmax
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck.scoring.completions import TokenIds
from ndcheck.scoring.scorers import Score, checked


class LocalScorer:
    """The model of a sampler, which is closed with it, with the kernels of one of its arms."""

    def __init__(self, sampler: TransformersSampler, arm: Arm) -> None:
        self._sampler = sampler
        self._arm = arm
        found = sampler.describe()
        self._n_ids = int(found["vocabulary"])
        self.title = f"{found['name']} in process, {found['dtype']}, {arm} kernels"

    def score(self, prompt_ids: TokenIds, token_ids: TokenIds) -> Score:
        if max(*prompt_ids, *token_ids) >= self._n_ids:
            raise BackendError(
                f"{self.title}: a token id is outside its vocabulary of {self._n_ids}"
            )
        try:
            with self._sampler.arm(self._arm), torch.inference_mode():
                # The last token is fed to nothing.
                rows = [[*prompt_ids, *token_ids[:-1]]]
                batch = self._sampler.open_batch(rows, 0)
                fed = torch.tensor(rows, device=batch.device)
                logprobs, ranks = read_tokens(batch.forward(fed, len(token_ids))[0], token_ids)
        except RuntimeError as error:
            raise BackendError(f"{self.title}: {first_line(error)}") from error
        return checked(logprobs, ranks, token_ids, self.title)

    def close(self) -> None:
        self._sampler.close()


def read_tokens(logits_T_V: Tensor, token_ids: TokenIds) -> tuple[list[float], list[int]]:
    """Log-probability (fp32) and rank, from 1, of each token, in the bits of `read_step`.

    Of equal logits the lower id has the lower rank.
    """
    ids = torch.tensor(token_ids, device=logits_T_V.device)
    chosen = logits_T_V.gather(-1, ids[:, None])
    if logits_T_V.is_cuda:
        from ndcheck_kernels.cuda.rows.logits import read_logits

        logprobs = (chosen[:, 0].float() - read_logits(logits_T_V)[2]).tolist()
    else:
        logprobs = log_softmax(logits_T_V.float()).gather(-1, ids[:, None])[:, 0].tolist()
    every_id = torch.arange(logits_T_V.shape[-1], device=logits_T_V.device)
    is_before = (logits_T_V > chosen) | ((logits_T_V == chosen) & (every_id < ids[:, None]))
    return logprobs, (is_before.sum(-1) + 1).tolist()
