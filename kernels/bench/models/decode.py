"""Decode step time of a shape by batch size: both arms under graph capture, and the floor.

    PYTHONPATH=kernels python -m bench.models.decode OUT_DIR [--shape qwen3-30b-a3b]

The floor is the larger of reading every weight once at the measured copy bandwidth and
2 x parameters x batch at the measured matrix rate; the embedding is not read, so not counted. Of a
mixture's experts it counts for reading those that a stock step's rows chose (`experts`, on average
over the layers: E (1 - (1 - k / E)^B) if each of B rows chose k of E evenly, but they agree more
than that), and for multiplying the k of each row.
`compiled` is the stock model under torch.compile and the same capture.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.table import Table
from ndcheck.records import Decoding
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.decoding.steps import DecodeSteps
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck_kernels.measure.timing import copy_gb_per_s, elapsed_us, mm_tflop_per_s

PROMPT_TOKENS = 16
N_TOKENS = 160
REPLAYS = 30
SHAPES = Path(__file__).parents[1] / "shapes"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def open_steps(sampler: TransformersSampler, batch_size: int) -> DecodeSteps:
    """The decode steps of a batch of different prompts, after its first token."""
    decoding = Decoding(N_TOKENS)
    rows = [[(7 * i + j) % 4096 for j in range(PROMPT_TOKENS)] for i in range(batch_size)]
    batch = ExactBatch(
        sampler._model, sampler._device, batch_size, PROMPT_TOKENS + decoding.max_tokens
    )
    steps = DecodeSteps(batch, decoding)
    batch.reset(rows)
    steps._begin(range(batch_size))
    steps._record(batch.prefill("whole"))
    return steps


def step_ms(sampler: TransformersSampler, arm: Any, batch_size: int) -> float:
    """Median time of a captured step, PROMPT_TOKENS + 2 to + 2 + REPLAYS tokens deep."""
    with torch.inference_mode(), sampler.arm(arm):
        steps = open_steps(sampler, batch_size)
        steps._step(1)
        # Nothing is captured on a CPU, which only the tiny shapes are for.
        advance = steps.replay if steps.batch.can_be_captured else partial(steps._step, 1)
        advance()
        if steps.capture_failure is not None:
            raise RuntimeError(f"the {arm} step is not captured: {steps.capture_failure}")
        times = [elapsed_us(advance, sampler._device.type) for _ in range(REPLAYS)]
        return statistics.median(times) / 1000


def experts_chosen(sampler: TransformersSampler, batch_size: int) -> float | None:
    """How many different experts a step's rows choose in a layer, on average; None without any."""
    counts: list[int] = []

    def count(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        (ids,) = (a for a in arguments if torch.is_tensor(a) and not a.is_floating_point())
        counts.append(ids.unique().numel())

    layers = [m for name, m in sampler.model.named_modules() if name.endswith(".experts")]
    if not layers:
        return None
    with torch.inference_mode():
        steps = open_steps(sampler, batch_size)
        hooks = [layer.register_forward_pre_hook(count) for layer in layers]
        steps._step(1)
    for hook in hooks:
        hook.remove()
    return statistics.mean(counts)


def floor_ms(
    model: Any, batch_size: int, n_experts: float | None, gb_per_s: float, tflop_per_s: float
) -> float:
    """Below which no step is; ``n_experts`` of each layer are read."""
    config = model.config
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    read = used = sum(sizes.values()) - experts - model.get_input_embeddings().weight.nbytes
    if n_experts is not None:
        read += experts * n_experts / config.num_experts
        used += experts * config.num_experts_per_tok / config.num_experts
    # A byte is half a bf16 weight, of two operations at the rate; or an FP8 one, at twice the rate.
    return max(read / gb_per_s / 1e6, used * batch_size / tflop_per_s / 1e9)


def requests_s(sampler: TransformersSampler, arm: Any, n_requests: int, most_rows: int) -> float:
    """Seconds for requests of 90 to 110 tokens, in exact batches of `most_rows`, prompts included.

    Every batch decodes to its longest row, as ndcheck does.
    """
    lengths = [90 + i * 7 % 21 for i in range(n_requests)]
    with torch.inference_mode(), sampler.arm(arm):
        start = time.perf_counter()
        for first in range(0, n_requests, most_rows):
            part = lengths[first : first + most_rows]
            rows = [[(7 * i + j) % 4096 for j in range(PROMPT_TOKENS)] for i in range(len(part))]
            batch = ExactBatch(
                sampler._model, sampler._device, len(rows), PROMPT_TOKENS + max(part)
            )
            batch.reset(rows)
            steps = DecodeSteps(batch, Decoding(max(part)))
            steps.run(batch.prefill("whole"), range(len(rows)), set(), None)
        return time.perf_counter() - start


def profile(sampler: TransformersSampler, arm: Any, batch_size: int) -> None:
    """Print what a captured step spends its time on."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step_ms(sampler, arm, batch_size)
    averages = profiler.key_averages()
    print(averages.table(sort_by="cuda_time_total", row_limit=18, max_name_column_width=60))


def compiled(sampler: TransformersSampler) -> Callable[[], None]:
    """Put the compiled forward in the place of the stock one; returns what undoes it."""
    model = sampler._model
    forward = model.forward
    model.forward = torch.compile(forward, dynamic=False)

    def undo() -> None:
        model.forward = forward
        torch._dynamo.reset()

    return undo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--shape",
        default="qwen3-8b",
        choices=sorted(p.name for p in SHAPES.iterdir() if p.is_dir()),
    )
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument(
        "--arms", default="invariant,stock", choices=("invariant,stock", "invariant")
    )
    parser.add_argument("--profile", help="batch sizes whose steps are profiled, such as 1,64,256")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--requests", type=int, default=0, help="time so many of 90-110 tokens")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    spec = replace(DEFAULTS, model=str(SHAPES / options.shape), random_weights=0)
    sampler = TransformersSampler(spec)
    device = sampler._device.type
    bandwidth, rate = copy_gb_per_s(device), mm_tflop_per_s(device)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{name}: copy {bandwidth:.0f} GB/s, mm {rate:.0f} TFLOP/s")
    table = Table(options.out / "decode.csv", echo=True)
    for batch_size in map(int, options.batches.split(",")):
        ours = step_ms(sampler, "invariant", batch_size)
        stock = {}
        if "stock" in options.arms:
            stock["stock_ms"] = step_ms(sampler, "stock", batch_size)
        if options.compiled:
            undo = compiled(sampler)
            stock["compiled_ms"] = step_ms(sampler, "stock", batch_size)
            undo()
        n_experts = experts_chosen(sampler, batch_size)
        floor = floor_ms(sampler.model, batch_size, n_experts, bandwidth, rate)
        table.add(
            batch=batch_size, experts="" if n_experts is None else n_experts,
            floor_ms=floor, invariant_ms=ours, stock_ms=stock.get("stock_ms", ""),
            compiled_ms=stock.get("compiled_ms", ""), over_floor=ours / floor,
            slowdown=ours / min(stock.values()) if stock else "",
        )  # fmt: skip
        torch.cuda.empty_cache()
    if options.requests:
        requests = Table(options.out / "requests.csv", echo=True)
        for most_rows in (256, 512):
            for arm in (*options.arms.split(","), "invariant"):
                seconds = requests_s(sampler, arm, options.requests, most_rows)
                requests.add(arm=arm, requests=options.requests, rows=most_rows, seconds=seconds)
                torch.cuda.empty_cache()
    if options.profile:
        for batch_size in map(int, options.profile.split(",")):
            profile(sampler, "invariant", batch_size)


if __name__ == "__main__":
    sys.exit(main())
