"""Scoring by vLLM's offline engine: the log-probabilities of a prompt that holds the completion."""

from __future__ import annotations

from ndcheck.records import Arm
from ndcheck.samplers.vllm.sampler import EngineSampler
from ndcheck.scoring.completions import TokenIds
from ndcheck.scoring.scorers import Score, checked


class EngineScorer:
    """The engine of a sampler, which is closed with it, in the mode of one of its arms."""

    def __init__(self, sampler: EngineSampler, arm: Arm) -> None:
        self._sampler = sampler
        self._arm = arm
        found = sampler.describe()
        by = found["invariant_by"] if arm == "invariant" else None
        mode = f"{arm} mode{f' by {by}' if by else ''}"
        self.title = f"{found['name']} in {found['engine']}, {found['dtype']}, {mode}"

    def score(self, prompt_ids: TokenIds, token_ids: TokenIds) -> Score:
        answer = self._sampler.score(self._arm, [*prompt_ids, *token_ids], len(prompt_ids))
        return checked(answer["logprobs"], answer["ranks"], token_ids, self.title)

    def close(self) -> None:
        self._sampler.close()
