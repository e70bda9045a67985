"""Freezes where products are borrowed, from what `bench.ops.borrowed` measured.

    PYTHONPATH=kernels python -m bench.ops.freeze_borrowed CELLS.csv BITS.csv

A cell counts up to its M, from above the M before it. It is borrowed where cuBLASLt took less than
0.98 of our time in every form measured, and its bits were ours at every number of rows tried in it.
Up to 16 rows it takes 0.9: there our launches overlap with those around them, which the time of one
product does not show. Shapes that were not measured follow the geometric mean of those that have no
tuned table either.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from ndcheck_kernels.cuda.configs import has_own_table

FEW_ROWS = 16


def gain(m: int) -> float:
    return 0.9 if m <= FEW_ROWS else 0.98


TABLE = Path(__file__).parents[2] / "ndcheck_kernels" / "cuda" / "borrowed_ranges.py"
Spans = tuple[tuple[int, int], ...]
Ranges = dict[tuple[int, int], Spans]


def ranges(cells: list[dict[str, str]], bits: list[dict[str, str]]) -> tuple[Ranges, Spans]:
    """By (N, K), the ranges of M to borrow, ascending; and those of every other shape."""
    slowest: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for cell in cells:
        shape, m = (int(cell["n"]), int(cell["k"])), int(cell["m"])
        ratio = float(cell["cublas_us"]) / float(cell["ours_us"])
        slowest[shape][m] = max(ratio, slowest[shape].get(m, 0.0))
    other = {(int(b["n"]), int(b["k"]), int(b["m"])) for b in bits if b["reason"]}
    found = {
        shape: _merged(by_m, {m for n, k, m in other if (n, k) == shape})
        for shape, by_m in sorted(slowest.items())
    }
    untuned: dict[int, list[float]] = defaultdict(list)
    for shape, by_m in slowest.items():
        for m, ratio in by_m.items() if not has_own_table(*shape) else ():
            untuned[m].append(ratio)
    means = {m: statistics.geometric_mean(ratios) for m, ratios in untuned.items()}
    return found, _merged(means, {m for _, _, m in other})


def _merged(by_m: dict[int, float], other: set[int]) -> Spans:
    found: list[tuple[int, int]] = []
    before = 0
    for m, ratio in sorted(by_m.items()):
        if ratio < gain(m) and not any(before < bad <= m for bad in other):
            first = before + 1
            if found and found[-1][1] == before:
                first = found.pop()[0]
            found.append((first, m))
        before = m
    return tuple(found)


def render(found: Ranges, others: Spans) -> str:
    """The module `ndcheck_kernels.cuda.borrowed_ranges`."""
    lines = "".join(f"    {shape}: {spans},\n" for shape, spans in found.items())
    return f'''"""From which M to which cuBLASLt without split-K was faster than ours, by (N, K).

Written by kernels/bench/ops/freeze_borrowed.py from borrowed.csv and borrowed_bits.csv of
results/kernels.
"""

RANGES: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {{
{lines}}}
OTHERS: tuple[tuple[int, int], ...] = {others}
"""Of shapes that were not measured."""
'''


def main(cells: Path, bits: Path) -> None:
    read = [list(csv.DictReader(path.open())) for path in (cells, bits)]
    TABLE.write_text(render(*ranges(*read)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
