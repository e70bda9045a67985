"""Times attention configurations against SDPA's fastest backend.

PYTHONPATH=kernels python -m bench.ops.tune_attention OUT_DIR
"""

from __future__ import annotations

import sys
from dataclasses import astuple
from functools import partial
from pathlib import Path

import torch

from bench.ops import sdpa
from bench.ops.attention_cells import operands, problems
from bench.ops.sdpa import Operands
from bench.table import Table
from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.configs import AttentionConfig, PrefillTile
from ndcheck_kernels.measure.timing import medians_us

CONFIGS = tuple(
    AttentionConfig(split, 64, PrefillTile(*tile), PrefillTile(*tile), *decode, 64, short)
    for split, short in ((256, 16), (256, 4), (512, 1000))
    for tile, decode in (((128, 8, 3), (4, 3)), ((64, 4, 2), (2, 4)))
)


def _ours(config: AttentionConfig, parallel: bool, operands: Operands) -> torch.Tensor:
    return causal._launch(*operands, None, None, causal.Kind(), config, parallel=parallel)


def tune(out: Path) -> None:
    table = Table(out / "tune_attention.csv", echo=False)
    for kind, batch, queries, context in problems():
        cases = operands(batch, queries, context)
        variants = sdpa.backends(cases)
        stock = list(variants)
        for config in CONFIGS:
            run = partial(_ours, config, kind == "decode")
            variants[str(astuple(config))] = [partial(run, case) for case in cases]
        times = medians_us(variants)
        best_us = min(times[name] for name in stock)
        for name, us in times.items():
            table.add(
                kind=kind, batch=batch, queries=queries, context=context, config=name, us=us,
                ratio=best_us / us,
            )  # fmt: skip


if __name__ == "__main__":
    tune(Path(sys.argv[1]))
