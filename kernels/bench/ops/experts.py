"""A layer of experts beside transformers' own implementations, on the same tensors.

    PYTHONPATH=kernels python -m bench.ops.experts OUT_DIR

Needs transformers. Times are of CUDA graph replays over inputs that rotate, so that every replay
chooses other experts; the router is part of the layer.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from bench.table import Table
from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.measure.timing import medians_us
from ndcheck_kernels.models import experts

TOKENS = (1, 8, 64, 512, 4096)
INPUTS = 8
# Copies the weights of every chosen expert for every token.
MOST_TOKENS = {"batched_mm": 64}
LAYERS = {
    "Qwen3-30B-A3B": (
        Qwen3MoeSparseMoeBlock,
        transformers.Qwen3MoeConfig(
            hidden_size=2048,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
        ),
    ),
    "gpt-oss-20B": (
        GptOssMLP,
        transformers.GptOssConfig(
            hidden_size=2880, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4
        ),
    ),
}


def apply(layer: Any, implementation: str, x: torch.Tensor) -> torch.Tensor:
    layer.experts.config._experts_implementation = implementation
    with invariant_kernels() if implementation == experts.NAME else nullcontext():
        out = layer(x)
    return out[0] if isinstance(out, tuple) else out


@torch.inference_mode()
def bench(out: Path) -> None:
    experts.register_experts()
    table = Table(out / "experts.csv")
    for name, (layer_class, config) in LAYERS.items():
        with torch.device("cuda"):
            layer = layer_class(config).bfloat16().eval()
            for parameter in layer.parameters():
                parameter.normal_(std=0.02)
            inputs = torch.randn(INPUTS, 1, max(TOKENS), config.hidden_size).bfloat16()
        for tokens in TOKENS:
            x = inputs[:, :, :tokens].contiguous()
            arms = [
                arm
                for arm in ("grouped_mm", "batched_mm", experts.NAME)
                if tokens <= MOST_TOKENS.get(arm, tokens)
            ]
            times = medians_us(
                {arm: [partial(apply, layer, arm, row) for row in x] for arm in arms}
            )
            ours = times.pop(experts.NAME)
            fastest = min(times, key=times.__getitem__)
            error = apply(layer, experts.NAME, x[0]) - apply(layer, fastest, x[0])
            table.add(
                layer=name,
                tokens=tokens,
                us=ours,
                stock=fastest,
                stock_us=times[fastest],
                ratio=times[fastest] / ours,
                difference=(error.norm() / apply(layer, fastest, x[0]).norm()).item(),
            )


if __name__ == "__main__":
    bench(Path(sys.argv[1]))
