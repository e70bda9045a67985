"""Time the invariant CPU kernels against stock on a Qwen3-shaped model.

    PYTHONPATH=kernels python -m bench.models.cpu_decode

Stock, the invariant kernels with a dispatch per op, and those with `direct_layers` as `ndcheck run`
has them, in turn on the same inputs, so that load on the machine hits all; a cell is the process's
CPU time, the least of its repetitions. Needs transformers.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from ndcheck_kernels import invariant_kernels, invariant_model
from ndcheck_kernels.models.caches.argument import cache_argument
from ndcheck_kernels.models.direct_layers import direct_layers

ARMS = ("stock", "op by op", "direct")


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
            with torch.no_grad(), kernels(model, arm):
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
    return {arm: (min(prefill[arm]), min(decode[arm])) for arm in ARMS}


@contextmanager
def kernels(model: Qwen3ForCausalLM, arm: str) -> Iterator[None]:
    with ExitStack() as stack:
        if arm != "stock":
            stack.enter_context(invariant_model(model))
            if arm == "direct" and stack.enter_context(direct_layers(model)) == 0:
                raise RuntimeError("no layer runs directly")
            stack.enter_context(invariant_kernels())
        yield


def step(
    model: Qwen3ForCausalLM, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
) -> None:
    new = mask.shape[1] - cache.get_seq_length()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
    model(
        input_ids=ids[:, :new],
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=1,
        **{cache_argument(model.forward): cache},
    )


def elapsed_ms(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 100, 200, 300])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("ms of CPU in stock, and the multiples of it that the others take")
    print("dtype     batch  length |  prefill  op by op  direct |   decode  op by op  direct")
    for dtype in options.dtypes:
        model = build_model(getattr(torch, dtype))
        for batch in options.batches:
            for length in options.lengths:
                times = time_steps(model, batch, length, options.repetitions)
                columns = [
                    f"{stock:8.2f} {by_op / stock:9.2f} {direct / stock:7.2f}"
                    for stock, by_op, direct in zip(*(times[arm] for arm in ARMS), strict=True)
                ]
                print(f"{dtype:9} {batch:5} {length:7} | {' | '.join(columns)}", flush=True)


if __name__ == "__main__":
    main()
