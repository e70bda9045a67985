"""Everything that 4-bit models need a GPU for, in one command, the most important figures first.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.weight_only.measure OUT_DIR [--seconds 150]

Bits of every schedule that is shipped or tried; the fastest of those tried, which the rest of the
run uses; products beside torch's of bf16 and of 4 bits; the 4-bit 8B's captured decode step beside
its floor; its properties; the step of bf16; the GPU tests of the kernels. Each part writes what it
has, and a part that fails is named at the end. With --tiny: the model parts on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench.fp8.measure import measure_properties, measure_steps
from bench.parts import Part, run_parts, run_tests

TESTS = ("tests/kernels/triton/packed",)


def check_and_tune(out: Path, until: float) -> None:
    from bench.weight_only import products

    started = time.monotonic()
    products.compile_all(products.SCHEDULES)
    usable = products.usable(products.SCHEDULES)
    print(f"{len(usable)} schedules run, {time.monotonic() - started:.0f} s", flush=True)
    found = products.find_differences(out, usable)
    print("\n".join(found) or "every schedule: the bits of plain weights", flush=True)
    right = [config for config in usable if not any(str(config) in line for line in found)]
    products.tune(out, right, until)
    if found:
        raise RuntimeError(f"{len(found)} schedules or controls differ")


def compare_products(out: Path) -> None:
    from bench.weight_only import products

    products.bench(out)


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
    until = time.monotonic() + options.seconds
    shape, batches, loads = "qwen3-8b-w4a16", (1, 8, 32, 128), "1,2,8,32"
    parts: list[Part] = [
        ("bits and schedules", lambda: check_and_tune(out, until - 0.5 * options.seconds)),
        ("products", lambda: compare_products(out)),
        ("8B step", lambda: measure_steps(out, shape, batches)),
        ("8B properties", lambda: measure_properties(out, shape, loads, 100, 32)),
        ("8B step in bf16", lambda: measure_steps(out, "qwen3-8b", batches)),
        ("tests", lambda: run_tests(out / "tests.txt", TESTS)),
    ]
    if options.tiny:
        parts = [
            ("step", lambda: measure_steps(out, "tiny-w4a16", (1, 2))),
            ("properties", lambda: measure_properties(out, "tiny-w4a16", "1,2", 24, 4)),
        ]
    return run_parts(parts, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
