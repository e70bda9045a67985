"""What a request asks for; an unknown name raises, as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RequestOutputKind(Enum):
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    max_tokens: int
    temperature: float
    detokenize: bool
    output_kind: RequestOutputKind
    skip_reading_prefix_cache: bool
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
