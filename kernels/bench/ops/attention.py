"""The shipped attention beside the fastest backend of scaled_dot_product_attention, in a minute.

PYTHONPATH=kernels python -m bench.ops.attention OUT_DIR
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path

from bench.ops import sdpa
from bench.ops.attention_cells import HEAD_DIM, HEADS, KV_HEADS, operands, problems
from bench.table import Table
from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.measure.timing import medians_us


def bench(out: Path) -> None:
    table = Table(out / "attention.csv", echo=False)
    for kind, batch, queries, context in problems():
        cases = operands(batch, queries, context)
        variants = sdpa.backends(cases)
        stock = list(variants)
        variants["ours"] = [partial(causal.attention, *case) for case in cases]
        times = medians_us(variants)
        backend = min(stock, key=lambda name: times[name])
        us = times["ours"]
        flop = 4 * batch * HEADS * HEAD_DIM * queries * context / (2 if queries > 1 else 1)
        moved = 4 * batch * KV_HEADS * context * HEAD_DIM
        table.add(
            kind=kind, batch=batch, queries=queries, context=context, us=us,
            stock_us=times[backend], backend=backend, ratio=times[backend] / us,
            flash_us=times.get("FLASH_ATTENTION", ""), tflop_per_s=flop / us / 1e6,
            kv_gb_per_s=moved / us / 1e3,
        )  # fmt: skip
        print(kind, batch, context, f"{times[backend] / us:.3f}", backend, flush=True)
    for kind, least in (("prefill", 2048), ("prefill", 1), ("decode", 1)):
        ratios = [
            float(str(row["ratio"]))
            for row in table.rows
            if row["kind"] == kind and int(str(row["context"])) >= least
        ]
        mean = statistics.geometric_mean(ratios)
        print(f"{kind} from {least} keys on: {mean:.3f}, least {min(ratios):.3f}", flush=True)


if __name__ == "__main__":
    bench(Path(sys.argv[1]))
