"""Decode step time of an 8B shape by batch size: both arms under graph capture, and the floor.

    PYTHONPATH=.:kernels python kernels/bench/bench_decode.py OUT_DIR [--batches 1,2] [--profile]

The floor is the larger of reading every weight once at the measured copy bandwidth and
2 x parameters x batch at the measured matrix rate; the embedding is not read, so not counted.
`compiled` is the stock model under torch.compile and the same capture.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from table import Table

from ndcheck.records import Decoding
from ndcheck.request import DEFAULTS
from ndcheck.samplers.batch import ExactBatch
from ndcheck.samplers.steps import DecodeSteps
from ndcheck.samplers.transformers import TransformersSampler
from ndcheck_kernels.timing import copy_gb_per_s, elapsed_us, mm_tflop_per_s

PROMPT_TOKENS = 16
N_TOKENS = 160
REPLAYS = 30
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def qwen3_8b(directory: Path) -> Path:
    """Write the config of Qwen3-8B (its published config.json); weights come from a seed."""
    transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(directory)
    return directory


def step_ms(sampler: TransformersSampler, arm: Any, batch_size: int) -> float:
    """Median time of a captured step, PROMPT_TOKENS + 2 to + 2 + REPLAYS tokens deep."""
    decoding = Decoding(N_TOKENS)
    rows = [[(7 * i + j) % 4096 for j in range(PROMPT_TOKENS)] for i in range(batch_size)]
    with torch.inference_mode(), sampler.arm(arm):
        batch = ExactBatch(
            sampler._model, sampler._device, batch_size, PROMPT_TOKENS + decoding.max_tokens
        )
        steps = DecodeSteps(batch, decoding)
        batch.reset(rows)
        steps._record(batch.prefill("whole"))
        steps._step(1)
        steps._replay()
        return statistics.median(elapsed_us(steps._replay) for _ in range(REPLAYS)) / 1000


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
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--requests", type=int, default=0, help="time so many of 90-110 tokens")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        spec = replace(DEFAULTS, model=str(qwen3_8b(Path(folder))), device="cuda", random_weights=0)
        sampler = TransformersSampler(spec)
    parameters = sampler.describe()["parameters"]
    read = 2 * (parameters - 151936 * 4096)
    bandwidth, rate = copy_gb_per_s(), mm_tflop_per_s()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth:.0f} GB/s, mm {rate:.0f} TFLOP/s")
    table = Table(options.out / "decode.csv", echo=True)
    for batch_size in map(int, options.batches.split(",")):
        stock = step_ms(sampler, "stock", batch_size)
        ours = step_ms(sampler, "invariant", batch_size)
        best = stock
        if options.compiled:
            undo = compiled(sampler)
            best = step_ms(sampler, "stock", batch_size)
            undo()
        floor = max(read / bandwidth / 1e6, read * batch_size / rate / 1e9)
        table.add(
            batch=batch_size, floor_ms=floor, invariant_ms=ours, stock_ms=stock,
            compiled_ms=best if options.compiled else "", over_floor=ours / floor,
            slowdown=ours / min(stock, best),
        )  # fmt: skip
        torch.cuda.empty_cache()
    if options.requests:
        requests = Table(options.out / "requests.csv", echo=True)
        for most_rows in (256, 512):
            for arm in ("invariant", "stock", "invariant"):
                seconds = requests_s(sampler, arm, options.requests, most_rows)
                requests.add(arm=arm, requests=options.requests, rows=most_rows, seconds=seconds)
                torch.cuda.empty_cache()
    if options.profile:
        for batch_size in (1, 64, 256):
            profile(sampler, "invariant", batch_size)


if __name__ == "__main__":
    sys.exit(main())
