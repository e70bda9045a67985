"""Scoring by a model in this process: prompt and completion in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ndcheck.errors import BackendError
from ndcheck.records import Arm
from ndcheck.samplers.local.batch import ExactBatch, cache_argument
from ndcheck.samplers.local.loading import first_line
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck.scoring.completions import TokenIds
from ndcheck.scoring.scorers import Score, checked


class LocalScorer:
    """The model of a sampler, which is closed with it, with the kernels of one of its arms."""

    def __init__(self, sampler: TransformersSampler, arm: Arm) -> None:
        self._sampler = sampler
        self._arm = arm
        self._device = next(sampler.model.parameters()).device
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
                logits = teacher_forced(self._sampler.model, self._device, prompt_ids, token_ids)
                logprobs, ranks = read_tokens(logits, token_ids)
        except RuntimeError as error:
            raise BackendError(f"{self.title}: {first_line(error)}") from error
        return checked(logprobs, ranks, token_ids, self.title)

    def close(self) -> None:
        self._sampler.close()


def teacher_forced(
    model: Any, device: torch.device, prompt_ids: TokenIds, token_ids: TokenIds
) -> Tensor:
    """Logits [T, vocabulary] before each of the T ``token_ids``, from one pass over a static cache.

    The last of them is fed to nothing. The cache is the one that decoding has, so that the kernels
    are those of a prefill there.
    """
    ids = torch.tensor([[*prompt_ids, *token_ids[:-1]]], device=device)
    n_columns = ids.shape[1]
    batch = ExactBatch(model, device, 1, n_columns)
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(n_columns, device=device)[None],
        use_cache=True,
        logits_to_keep=len(token_ids),
        **{cache_argument(model): batch.cache},
    ).logits
    return torch.as_tensor(logits[0])


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
        # Each row on a copy of its own: this reduction must not itself depend on the others.
        rows = zip(logits_T_V, token_ids, strict=True)
        logprobs = [float(torch.log_softmax(row.clone().float(), dim=-1)[i]) for row, i in rows]
    every_id = torch.arange(logits_T_V.shape[-1], device=logits_T_V.device)
    is_before = (logits_T_V > chosen) | ((logits_T_V == chosen) & (every_id < ids[:, None]))
    return logprobs, (is_before.sum(-1) + 1).tolist()
