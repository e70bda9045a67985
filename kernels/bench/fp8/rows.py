"""What FP8 with one scale a row, and an FP8 key-value cache, need a GPU for, in one command.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.fp8.rows OUT_DIR [--seconds 150]

Bits of every schedule, with a control; products beside torch._scaled_mm by rows; step and
properties of an 8B by channels; properties of an FP8 8B over an FP8 cache; the tests of both. Each
part writes what it has, and one that fails or is cut short is named at the end. With --tiny: the
properties on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch

from bench.fp8.measure import measure_properties, measure_steps
from bench.fp8.products import SHAPES, runs
from bench.parts import Part, compile_each, run_parts, run_tests
from bench.table import Table, print_means
from ndcheck_kernels.cuda.products.fp8 import fp8_matmul
from ndcheck_kernels.cuda.products.fp8.fp8_configs import Fp8Config, selectable_configs
from ndcheck_kernels.cuda.rows.quantise import OneScale, quantise_rows
from ndcheck_kernels.measure.timing import copies, medians_us
from ndcheck_kernels.ops.row_fp8 import quantise_weight

TESTS = (
    "tests/kernels/triton/fp8/test_row_fp8.py",
    "tests/kernels/triton/fp8/test_projections.py",
    "tests/kernels/triton/fp8/test_fp8_cache.py",
    "tests/kernels/triton/test_decoder.py::test_a_row_has_the_same_bits_over_an_fp8_cache",
)
BATCHES = (1, 16, 64, 1024)


def compile_shipped() -> None:
    compile_each(_compile, selectable_configs(90, by_block=False))


def _compile(config: Fp8Config) -> None:
    for k, m, dtype in product((512, 4096, 12288), (1, 129), (torch.bfloat16, torch.float32)):
        weight = quantise_weight(torch.ones(256, k, device="cuda"), 256)
        codes = quantise_rows(torch.ones(m, k, device="cuda").bfloat16(), one_scale=OneScale())
        fp8_matmul._launch(*codes, *weight, None, dtype, config)
    torch.cuda.synchronize()


def compare_schedules(out: Path) -> None:
    """Every row of 600 has the bits of the first schedule, in any number of rows; of K backwards
    it has not.
    """
    configs, differing = selectable_configs(90, by_block=False), []
    table = Table(out / "row_fp8_bits.csv", echo=False)
    for n, k in ((1024, 512), (1008, 3984), (384, 12288)):
        half = torch.randn(600, k // 2, device="cuda")
        w, order = torch.randn(n, k // 2, device="cuda"), torch.randperm(k, device="cuda")
        weight, scales = quantise_weight(torch.cat([w, -w], 1)[:, order].contiguous(), n)
        codes, rows = quantise_rows(
            torch.cat([half, half], 1)[:, order].bfloat16(), one_scale=OneScale()
        )
        launch = partial(fp8_matmul._launch, addend=None, dtype=torch.float32)
        expected = launch(codes, rows, weight, scales, config=configs[0])
        for config in configs:
            same = all(
                torch.equal(
                    launch(codes[a : a + m].contiguous(), rows[a : a + m], weight, scales,
                           config=config), expected[a : a + m])
                for a, m in ((0, 600), (7, 1), (100, 17), (5, 129), (299, 300))
            )  # fmt: skip
            table.add(n=n, k=k, config=str(config), equal=same)
            differing += [] if same else [f"{n}x{k} {config}"]
        backwards = (codes.flip(1).contiguous(), rows, weight.flip(1).contiguous(), scales)
        if torch.equal(launch(*backwards, config=configs[0]), expected):
            differing.append(f"{n}x{k}: the control, K backwards, has the same bits")
    print("\n".join(differing) or "every shipped schedule: one bit class", flush=True)
    if differing:
        raise RuntimeError(f"{len(differing)} schedules or controls differ")


def compare_products(out: Path) -> None:
    def quantised(x: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        return fp8_matmul.fp8_matmul(*quantise_rows(x, one_scale=OneScale()), *weight)

    def stock(
        codes: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        by_row, by_output = rows[:, None], scales[None]
        return torch._scaled_mm(codes, weight.t(), by_row, by_output, out_dtype=torch.bfloat16)

    table = Table(out / "row_fp8.csv", echo=False)
    for shape, (n, k) in SHAPES.items():
        held = [
            quantise_weight(torch.randn(n, k, device="cuda") * 0.02, n)
            for _ in range(copies(n * k))
        ]
        for m in BATCHES:
            x = torch.randn(m, k, device="cuda").bfloat16()
            codes = quantise_rows(x, one_scale=OneScale())
            if reason := runs(partial(stock, *codes, *held[0])):
                raise RuntimeError(f"torch._scaled_mm by rows: {reason}")
            us = medians_us({
                "ours": [partial(fp8_matmul.fp8_matmul, *codes, *each) for each in held],
                "quantised": [partial(quantised, x, *each) for each in held],
                "stock": [partial(stock, *codes, *each) for each in held],
            })  # fmt: skip
            ratio = us["stock"] / us["ours"]
            far = (
                (fp8_matmul.fp8_matmul(*codes, *held[0]) - stock(*codes, *held[0]))
                .abs()
                .max()
                .item()
            )
            table.add(
                shape=shape, n=n, k=k, m=m, us=us["ours"], quantised_us=us["quantised"],
                stock_us=us["stock"], ratio=ratio, largest_difference=far,
            )  # fmt: skip
            print(shape, m, *(f"{value:.2f}" for value in (*us.values(), ratio, far)), flush=True)
    print_means(table, ("ratio",))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=150, help="when to stop")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on CPU")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    narrow = ("--kv-cache-dtype", "fp8")
    parts: list[Part] = [
        ("compiling", compile_shipped),
        ("bits", lambda: compare_schedules(out)),
        ("products", lambda: compare_products(out)),
        ("step of the 8B by channels", lambda: measure_steps(
            out, "qwen3-8b-fp8-channel", (1, 32))),
        ("8B by channels", lambda: measure_properties(
            out, "qwen3-8b-fp8-channel", "1,2,8", 60, 16)),
        ("FP8 8B over an FP8 cache", lambda: measure_properties(
            out, "qwen3-8b-fp8", "1,2,8", 60, 16, *narrow)),
        ("tests", lambda: run_tests(out / "row_tests.txt", TESTS)),
    ]  # fmt: skip
    if options.tiny:
        parts = [
            ("by channels", lambda: measure_properties(out, "tiny-fp8-channel", "1,2", 24, 4)),
            ("over an FP8 cache", lambda: measure_properties(
                out, "tiny-fp8", "1,2", 24, 4, *narrow)),
        ]  # fmt: skip
    return run_parts(parts, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
