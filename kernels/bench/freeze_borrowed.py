"""Freezes where products are borrowed, from what bench_borrowed.py measured.

    python kernels/bench/freeze_borrowed.py results/kernels/borrowed.csv results/kernels/bits.csv

A cell counts up to its M, from above the M before it. It is borrowed where cuBLASLt took less than
0.98 of our time in every form measured, and its bits were ours at every number of rows tried in it.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

GAIN = 0.98
TABLE = Path(__file__).parents[1] / "ndcheck_kernels" / "borrowed_ranges.py"
Ranges = dict[tuple[int, int], tuple[tuple[int, int], ...]]


def ranges(cells: list[dict[str, str]], bits: list[dict[str, str]]) -> Ranges:
    """By (N, K), the ranges of M to borrow, ascending."""
    slowest: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for cell in cells:
        shape, m = (int(cell["n"]), int(cell["k"])), int(cell["m"])
        ratio = float(cell["cublas_us"]) / float(cell["ours_us"])
        slowest[shape][m] = max(ratio, slowest[shape].get(m, 0.0))
    other = {(int(b["n"]), int(b["k"]), int(b["m"])) for b in bits if b["reason"]}
    return {
        shape: found
        for shape, by_m in sorted(slowest.items())
        if (found := _merged(by_m, {m for n, k, m in other if (n, k) == shape}))
    }


def _merged(by_m: dict[int, float], other: set[int]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    before = 0
    for m, ratio in sorted(by_m.items()):
        if ratio < GAIN and not any(before < bad <= m for bad in other):
            first = before + 1
            if found and found[-1][1] == before:
                first = found.pop()[0]
            found.append((first, m))
        before = m
    return tuple(found)


def render(found: Ranges) -> str:
    """The module `ndcheck_kernels.borrowed_ranges`."""
    head = TABLE.read_text().split("RANGES")[0].replace(" Empty: not measured.", "")
    lines = "".join(f"    {shape}: {spans},\n" for shape, spans in found.items())
    body = f"{{\n{lines}}}" if lines else "{}"
    return f"{head}RANGES: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {body}\n"


def main(cells: Path, bits: Path) -> None:
    read = [list(csv.DictReader(path.open())) for path in (cells, bits)]
    TABLE.write_text(render(ranges(*read)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
