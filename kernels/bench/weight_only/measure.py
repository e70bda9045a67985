"""Everything that 4-bit models need a GPU for, in one command, the most important figures first.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.weight_only.measure OUT_DIR [--seconds 150]

The 4-bit 8B's captured decode step beside its floor; products beside torch's of bf16 and of 4 bits,
few rows first; bits of every schedule that is shipped; the 8B's properties; the GPU tests of the
kernels; the step of bf16; and the fastest of other schedules, whose bits are compared first. Each
part writes what it has, and one that fails or is cut short is named at the end. With --tiny: the
model parts on a CPU.
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

    out.mkdir(exist_ok=True)
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


def compile_shipped() -> None:
    from bench.weight_only import products
    from ndcheck_kernels.cuda.products.weight_only import selectable_configs

    products.compile_all(selectable_configs(4, products.GROUP))


def compare_schedules(out: Path) -> None:
    from bench.weight_only import products

    found = products.find_differences(out)
    print("\n".join(found) or "every shipped schedule: the bits of plain weights", flush=True)
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
    shape, batches = "qwen3-8b-w4a16", (1, 8, 32, 128)
    parts: list[Part] = [
        ("compiling", compile_shipped),
        ("8B step", lambda: measure_steps(out, shape, batches)),
        ("products", lambda: compare_products(out)),
        ("bits", lambda: compare_schedules(out)),
        ("8B properties", lambda: measure_properties(out, shape, "1,2,8", 60, 16)),
        ("tests", lambda: run_tests(out / "tests.txt", TESTS)),
        ("8B step in bf16", lambda: measure_steps(out, "qwen3-8b", batches)),
        ("other schedules", lambda: check_and_tune(out / "tried", until)),
    ]
    if options.tiny:
        parts = [
            ("step", lambda: measure_steps(out, "tiny-w4a16", (1, 2))),
            ("properties", lambda: measure_properties(out, "tiny-w4a16", "1,2", 24, 4)),
        ]
    return run_parts(parts, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
