"""How much memory each of several GPUs needs for a shape that they share: by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ndcheck.request import make_spec
from ndcheck.samplers.local.checkpoint.quantised import forget_quantisation
from ndcheck.samplers.local.loading import build_empty, load_config
from ndcheck_kernels.models.tensor_parallel import REPLICATED, styles

RESERVE = 4 * 10**9
"""The CUDA context, NCCL, kernels, and what a captured step keeps beside its cache, in bytes."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on each GPU."""

    weights: int
    drawing: int
    """The largest module, whole, and this GPU's part of it, while it is drawn or digested."""
    cache: int
    """Keys and values of the largest batch."""
    logits: int
    """Of the largest batch, in the model's dtype, gathered, and in float32 as they are read."""

    @property
    def most(self) -> int:
        return RESERVE + self.weights + max(self.drawing, self.cache + self.logits)

    def __str__(self) -> str:
        parts = {
            "weights": self.weights, "drawing": self.drawing, "keys and values": self.cache,
            "logits": self.logits, "all else": RESERVE, "at most": self.most,
        }  # fmt: skip
        return ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in parts.items())


def rank_memory(
    model: Path, n_ranks: int, n_rows: int, n_columns: int, *, is_bf16: bool = False
) -> RankMemory:
    """Of a folder with a config.json, for batches up to ``n_rows`` rows of ``n_columns`` tokens."""
    spec = make_spec(model=str(model), random_weights=0)
    config = load_config(str(model), spec)
    if is_bf16:
        forget_quantisation(config)
    empty = build_empty(str(model), config, spec)
    style_of = styles(empty)
    weights = largest = 0
    for module in empty.modules():
        sizes = [p.nbytes for p in module.parameters(recurse=False)]
        is_cut = style_of.get(module) not in (None, *REPLICATED)
        here = sum(sizes) // n_ranks if is_cut else sum(sizes)
        weights += here
        # Gathered for the digest, a weight is there three times: whole, as it came, and turned.
        largest = max(largest, sum(sizes) + here, 3 * max(sizes, default=0))
    text: Any = config.get_text_config(decoder=True)
    heads = text.num_key_value_heads // n_ranks
    itemsize = torch.empty((), dtype=config.dtype).itemsize
    per_token = text.num_hidden_layers * 2 * heads * text.head_dim * itemsize
    logits = n_rows * text.vocab_size * (3 * itemsize + 3 * 4)
    return RankMemory(weights, largest, n_rows * n_columns * per_token, logits)
