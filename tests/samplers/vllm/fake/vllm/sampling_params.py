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
    seed: int | None
    logprobs: int
    ignore_eos: bool
    detokenize: bool
    output_kind: RequestOutputKind
    skip_reading_prefix_cache: bool
