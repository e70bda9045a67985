"""Time the invariant CPU kernels against stock on a Qwen3-shaped model.

    PYTHONPATH=kernels python -m bench.models.cpu_decode

Both arms run in turn on the same inputs, so that load on the machine hits both; a cell is the
median over its repetitions. Needs transformers.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from ndcheck_kernels import invariant_kernels, register_attention

ARMS = ("sdpa", "ndcheck_invariant")


def build_model(dtype: torch.dtype) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
    )
    return Qwen3ForCausalLM(config).to(dtype).eval()


def left_padded(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of rows whose lengths differ, the first being the longest."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        mask[row, : row % (length // 4)] = 0
    return torch.randint(4096, (batch, length)), mask


def time_steps(
    model: Qwen3ForCausalLM, batch: int, length: int, repetitions: int
) -> dict[str, tuple[float, float]]:
    """Milliseconds of a prefill and of a decode step, by arm."""
    ids, mask = left_padded(batch, length)
    prefill: dict[str, list[float]] = {arm: [] for arm in ARMS}
    decode: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for repetition in range(repetitions + 1):
        for arm in ARMS:
            model.set_attn_implementation(arm)
            with torch.no_grad(), nullcontext() if arm == "sdpa" else invariant_kernels():
                cache = DynamicCache(config=model.config)
                elapsed = elapsed_ms(lambda cache=cache: step(model, ids, mask, cache))
                grown = torch.cat([mask, mask.new_ones(batch, 1)], -1)
                steps = []
                for _ in range(4):
                    steps.append(
                        elapsed_ms(lambda cache=cache, g=grown: step(model, ids, g, cache))
                    )
                    grown = torch.cat([grown, mask.new_ones(batch, 1)], -1)
            if repetition:  # The first one proves kernels and warms caches.
                prefill[arm].append(elapsed)
                decode[arm] += steps
    return {arm: (statistics.median(prefill[arm]), statistics.median(decode[arm])) for arm in ARMS}


def step(
    model: Qwen3ForCausalLM, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
) -> None:
    new = mask.shape[1] - cache.get_seq_length()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
    model(
        input_ids=ids[:, :new],
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        logits_to_keep=1,
    )


def elapsed_ms(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 100, 200, 300])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options = parser.parse_args()
    register_attention()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ms, stock | invariant")
    print("dtype     batch  length |   prefill          ratio |    decode          ratio")
    for dtype in options.dtypes:
        model = build_model(getattr(torch, dtype))
        for batch in options.batches:
            for length in options.lengths:
                times = time_steps(model, batch, length, options.repetitions)
                (p0, d0), (p1, d1) = (times[arm] for arm in ARMS)
                print(
                    f"{dtype:9} {batch:5} {length:7} | {p0:7.1f} {p1:8.1f} {p1 / p0:6.2f}x "
                    f"| {d0:7.2f} {d1:8.2f} {d1 / d0:6.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
