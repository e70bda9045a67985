"""Scoring by vLLM's offline engine: the log-probabilities of a prompt that holds the completion."""

from __future__ import annotations

from ndcheck.records import Engine, RunSpec
from ndcheck.samplers.vllm.sampler import EngineSampler
from ndcheck.scoring.completions import TokenIds
from ndcheck.scoring.scorers import Score, checked


class EngineScorer:
    """The engine of ``spec``, in the mode of its first arm, in a process of its own."""

    def __init__(self, spec: RunSpec) -> None:
        self._arm = spec.arms[0]
        self._sampler = EngineSampler(spec, spec.engine or Engine())
        found = self._sampler.describe()
        self.title = f"{spec.model} in {found['engine']}, {found['dtype']}, {self._arm} mode"

    def score(self, prompt_ids: TokenIds, token_ids: TokenIds) -> Score:
        answer = self._sampler.score(self._arm, [*prompt_ids, *token_ids], len(prompt_ids))
        return checked(answer["logprobs"], answer["ranks"], token_ids, self.title)

    def close(self) -> None:
        self._sampler.close()
