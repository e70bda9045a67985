"""Everything that FP8 models need a GPU for, in one command, the most important figures first.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.fp8.measure OUT_DIR [--seconds 150]

The FP8 8B's captured decode step beside its floor; products beside torch._scaled_mm, few rows
first; bits of every schedule that is shipped; memory and step of a 30B-A3B; properties of the 8B;
the GPU tests of the kernels; what a step spends its time on. Each part writes what it has, and one
that fails or is cut short is named at the end. With --tiny: the model parts on a CPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.models.decode import SHAPES, experts_chosen, floor_ms, profile, step_ms
from bench.parts import REPOSITORY, Part, run_parts, run_tests
from bench.table import Table
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck_kernels.cuda.products.fp8.fp8_configs import Fp8Config
from ndcheck_kernels.measure.timing import copy_gb_per_s, mm_tflop_per_s

TESTS = (
    "tests/kernels/triton/fp8/test_block_fp8.py",
    "tests/kernels/triton/test_fp8_decoder.py",
    "tests/kernels/gpu/test_block_fp8_bits.py",
)


def open_model(shape: str) -> TransformersSampler:
    spec = replace(DEFAULTS, model=str(SHAPES / shape), random_weights=0, arms=("invariant",))
    return TransformersSampler(replace(spec, axes=("batch-size",)))


def measure_steps(
    out: Path, shape: str, batches: tuple[int, ...], profiled: tuple[int, ...] = ()
) -> None:
    """Captured steps of the invariant arm, its floor, and the memory that the weights take.

    Prints what steps of ``profiled`` rows spend their time on.
    """
    started, device = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    sampler = open_model(shape)
    weights = sum(p.nbytes for p in sampler.model.parameters()) / 1e9
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")
    print(f"{shape}: {weights:.2f} GB of weights, {peak:.2f} GB at most while they were made, "
          f"{time.monotonic() - started:.1f} s", flush=True)  # fmt: skip
    bandwidth, rate = copy_gb_per_s(device), mm_tflop_per_s(device)
    table = Table(out / f"decode-{shape}.csv")
    for batch in batches:
        ours = step_ms(sampler, "invariant", batch)
        chosen = experts_in(sampler, batch)
        floor = floor_ms(sampler.model, batch, chosen, bandwidth, rate)
        table.add(
            batch=batch, experts="" if chosen is None else chosen, floor_ms=floor,
            invariant_ms=ours, over_floor=ours / floor, weights_gb=weights, peak_gb=peak,
            copy_gb_per_s=bandwidth, mm_tflop_per_s=rate,
        )  # fmt: skip
    for batch in profiled:
        profile(sampler, "invariant", batch)


def experts_in(sampler: TransformersSampler, batch: int) -> float | None:
    if not hasattr(sampler.model.config, "num_experts"):
        return None
    with sampler.arm("invariant", fuse=False):
        return experts_chosen(sampler, batch)


def measure_properties(
    out: Path, shape: str, loads: str, samples: int, tokens: int, *extra: str
) -> None:
    """All five properties of the invariant arm, by `ndcheck run`."""
    directory = out / "-".join(["run", shape, *(word.strip("-") for word in extra)])
    command = [
        *(sys.executable, "-m", "ndcheck", "run", "--model", str(SHAPES / shape)),
        *("--random-weights", "0", "--kernels", "invariant", "--loads", loads, "--quiet"),
        *("-n", str(samples), "--max-tokens", str(tokens), "--out", str(directory), *extra),
    ]
    path = f"{REPOSITORY}:{REPOSITORY / 'kernels'}"
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    print(done.stdout[-3000:], done.stderr[-1500:], f"exit code {done.returncode}", flush=True)
    if done.returncode:
        raise RuntimeError(f"ndcheck run ended with {done.returncode}")


def compare_schedules(out: Path, configs: tuple[Fp8Config, ...] = ()) -> None:
    """Of these schedules, or of all that are shipped."""
    from bench.fp8 import products

    found = products.find_differences(out, configs)
    print("\n".join(found) or "all schedules: one bit class", flush=True)
    if found:
        raise RuntimeError(f"{len(found)} schedules or controls differ")


def gpu_parts(out: Path) -> list[Part]:
    from bench.fp8 import products

    dense, mixture = "qwen3-8b-fp8", "qwen3-30b-a3b-fp8"
    return [
        ("compiling", products.compile_shipped),
        ("8B step", lambda: measure_steps(out, dense, (1, 8, 32, 128))),
        ("products", lambda: products.bench(out)),
        ("bits", lambda: compare_schedules(out)),
        ("30B-A3B", lambda: measure_steps(out, mixture, (1, 64))),
        ("8B properties", lambda: measure_properties(out, dense, "1,2,8", 60, 16)),
        ("30B-A3B properties", lambda: measure_properties(out, mixture, "1,2,8", 40, 16)),
        ("tests", lambda: run_tests(out / "tests.txt", TESTS)),
    ]


def tiny_parts(out: Path) -> list[Part]:
    return [
        (f"{shape} {name}", call)
        for shape in ("tiny-fp8", "tiny-moe-fp8")
        for name, call in (
            ("step", lambda shape=shape: measure_steps(out, shape, (1, 2))),
            ("properties", lambda shape=shape: measure_properties(out, shape, "1,2", 24, 4)),
        )
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=150, help="when to stop")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on CPU")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    parts = tiny_parts(out) if options.tiny else gpu_parts(out)
    return run_parts(parts, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
