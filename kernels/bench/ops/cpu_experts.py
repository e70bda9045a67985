"""Time a layer of experts on CPU against transformers' implementations.

    PYTHONPATH=kernels python -m bench.ops.cpu_experts

A Qwen3-MoE layer with hidden size 256 and 32 experts of 128, four of them a token. CPU time of one
thread, the least of its repetitions, so that other work on the machine counts little. Needs
transformers.
"""

import argparse
import time
from contextlib import nullcontext
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.models import experts

STOCK = ("eager", "batched_mm", "grouped_mm")


def build_layer(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=256, moe_intermediate_size=128, num_experts=32, num_experts_per_tok=4
    )
    layer = Qwen3MoeSparseMoeBlock(config).to(dtype).eval().requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return layer


def least_ms(layer: Any, implementation: str, x: torch.Tensor, repetitions: int) -> float:
    layer.experts.config._experts_implementation = implementation
    times = []
    with invariant_kernels() if implementation == experts.NAME else nullcontext():
        for _ in range(repetitions + 1):  # The first one proves kernels and warms caches.
            start = time.process_time()
            layer(x)
            times.append(1e3 * (time.process_time() - start))
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    options = parser.parse_args()
    torch.set_num_threads(1)
    experts.register_experts()
    for dtype in (torch.bfloat16, torch.float32):
        layer = build_layer(dtype)
        for tokens in options.tokens:
            x = torch.randn(1, tokens, 256).to(dtype)
            times = {name: least_ms(layer, name, x, options.repetitions) for name in STOCK}
            ours = least_ms(layer, experts.NAME, x, options.repetitions)
            fastest = min(times, key=times.__getitem__)
            print(
                f"{dtype} {tokens:4} tokens: {ours:6.2f} ms, {fastest} {times[fastest]:6.2f} ms, "
                f"{ours / times[fastest]:.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
