"""Products of FP8 blocks by Hopper's kernel: bits first, then which schedules to ship.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.fp8.hopper OUT_DIR [--seconds 60]

Compiles all schedules, in processes that run none; runs the GPU tests of their bits in another, so
that a kernel that never ends is ended; then times them beside what is shipped, 64 rows first, and
prints the entries of `fp8_configs.MEASURED`. `recorded_us` is DeepGEMM's time in
results/fp8/vllm.csv. Last, where vLLM is installed, DeepGEMM itself beside the fastest; it compiles
itself by nvcc.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch

from bench.fp8.products import BY_HAND, SERVES, SHAPES, runs, schedule_times, weights
from bench.parts import REPOSITORY, compile_each, run_parts, run_tests
from bench.table import Table, print_means, rows_of
from ndcheck_kernels.cuda.products.fp8 import fp8_configs, fp8_matmul
from ndcheck_kernels.cuda.products.fp8.fp8_configs import Fp8Config
from ndcheck_kernels.cuda.rows.quantise import quantise_rows
from ndcheck_kernels.measure import resources
from ndcheck_kernels.measure.timing import copies, medians_us

TESTS = ("tests/kernels/gpu/test_block_fp8_hopper_bits.py",)
ROWS = (64, 256, 4096, 1024, 128)
"""The most telling ones first."""
Cell = tuple[str, int]
"""A shape's name, and a number of rows."""


def compile_schedules() -> None:
    """As the tests and the measurement launch them."""
    each = product(BY_HAND, (torch.float32, torch.bfloat16, torch.float16), (200, 256))
    compile_each(_compile, *zip(*each, strict=True))


def _compile(config: Fp8Config, dtype: torch.dtype, n: int) -> None:
    codes, weight = (torch.empty(r, 4096, dtype=torch.float8_e4m3fn) for r in (64, n))
    row_scales, scales = torch.empty(32, 64).t(), torch.empty(2, 32)
    rows = torch.empty(n, 2, n, dtype=dtype)
    addends = (rows[0, 0], rows[:64, 1], rows[:, 0, :64].t())
    with resources.compiling(90):
        for addend in (None, *(addends if dtype == torch.bfloat16 and n == 256 else ())):
            fp8_matmul._launch(codes, row_scales, weight, scales, addend, dtype, config)


class Schedules:
    """Those by hand and the shipped one, over the shapes of a dense 8B."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.are_equal = False
        self.fastest: dict[Cell, Fp8Config] = {}

    def check(self) -> None:
        run_tests(self.out / "hopper_tests.txt", TESTS, timeout_s=100)
        self.are_equal = True

    def time(self) -> None:
        """Raises RuntimeError where bits were not found to be equal."""
        if not self.are_equal:
            raise RuntimeError("times of other bits say nothing")
        try:
            self._time_each(Table(self.out / "hopper_schedules.csv", echo=False))
        finally:  # Also of what was reached in time.
            for shape, size in SHAPES.items():
                reached = ((SERVES[m], self.fastest.get((shape, m))) for m in sorted(ROWS))
                lines = (f"    ({most}, {config})," for most, config in reached if config)
                print(f"{size}:", *lines, sep="\n", flush=True)

    def _time_each(self, table: Table) -> None:
        recorded = {
            (row["shape"], int(row["m"])): float(row["deep_gemm_us"])
            for row in rows_of(REPOSITORY / "results" / "fp8" / "vllm.csv")
        }
        for m, (shape, (n, k)) in product(ROWS, SHAPES.items()):
            shipped = fp8_configs.product_config(m, n, k, 90)
            configs = dict.fromkeys((shipped, *BY_HAND))
            times = schedule_times(m, n, k, configs)
            us = {config: times[str(config)] for config in configs}
            for config, each in sorted(us.items(), key=lambda item: item[1]):
                table.add(
                    shape=shape, n=n, k=k, m=m, us=each, shipped_us=us[shipped],
                    recorded_us=recorded.get((shape, m), ""), config=str(config),
                )  # fmt: skip
            best = min(us, key=us.__getitem__)
            self.fastest[shape, m] = best
            theirs = recorded.get((shape, m), float("nan"))
            print(
                f"{shape} {m}: {us[best]:.2f} us {best}; shipped {us[shipped]:.2f}; DeepGEMM "
                f"{theirs:.2f}, ratio {theirs / us[best]:.3f}; "
                f"{2e-6 * m * n * k / us[best]:.0f} TFLOP/s", flush=True,
            )  # fmt: skip

    def compare(self) -> None:
        """The fastest beside DeepGEMM, in turns."""
        from bench.engines.quantised import aligned, deep_gemm, require_near

        table = Table(self.out / "hopper_deep_gemm.csv")
        for (shape, m), config in self.fastest.items():
            n, k = SHAPES[shape]
            held = [weights(n, k) for _ in range(copies(n * k))]
            codes, scales = quantise_rows(torch.randn(m, k, device="cuda").bfloat16())
            ours = [
                partial(fp8_matmul._launch, codes, scales, *each, None, torch.bfloat16, config)
                for each in held
            ]

            given = aligned(scales)
            first = partial(deep_gemm, codes, given, held[0])
            if reason := runs(partial(require_near, first, ours[0]())):
                print(f"DeepGEMM is refused: {reason}", flush=True)
                return
            us = medians_us({
                "ours": ours, "deep_gemm": [partial(deep_gemm, codes, given, each) for each in held]
            })  # fmt: skip
            table.add(
                shape=shape, n=n, k=k, m=m, us=us["ours"], deep_gemm_us=us["deep_gemm"],
                ratio=us["deep_gemm"] / us["ours"], config=str(config),
            )  # fmt: skip
        print_means(table, ("ratio",))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="when to stop")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    schedules = Schedules(options.out)
    return run_parts(
        [
            ("compiling", compile_schedules),
            ("bits", schedules.check),
            ("schedules", schedules.time),
            ("DeepGEMM", schedules.compare),
        ],
        options.seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
