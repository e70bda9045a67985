"""Times classes of attention, and schedules within them, against SDPA's fastest backend.

Three minutes for both kinds, most of them for compiling; the cells that matter most come first.

PYTHONPATH=kernels python -m bench.tuning.attention OUT_DIR [decode|prefill]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench.ops import sdpa
from bench.ops.attention_cells import operands
from bench.ops.sdpa import Operands
from bench.table import Table
from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.configs import AttentionConfig, DecodeTile, attention_config
from ndcheck_kernels.measure.timing import medians_us

SHIPPED = attention_config(128, 2, 90)
CLASSES = {
    "shipped": SHIPPED,
    "256x8": replace(SHIPPED, short_splits=8),
    "512x8": replace(SHIPPED, split=512, short_splits=8),
    "512": replace(SHIPPED, split=512, short_splits=1000),
}
"""How long splits are, and after how many they are four times as long."""
TILES = (
    DecodeTile(4, 2, by_hand=True),
    DecodeTile(4, 3),
    DecodeTile(4, 2),
    DecodeTile(4, 2, 4),
    DecodeTile(4, 2, 8),
    DecodeTile(4, 1, 16),
    DecodeTile(8, 2, 8),
    DecodeTile(8, 3, 4),
)
DECODE = (
    *((1, 1024), (16, 1024), (64, 1024), (1, 4096), (1, 32768), (16, 4096), (4, 4096), (64, 4096)),
    *((1, 128), (16, 128), (4, 1024), (4, 32768), (256, 1024), (64, 128), (4, 128), (16, 32768)),
)
PREFILL = ((1, 2048), (4, 2048), (1, 8192), (1, 32768), (16, 1024), (1, 512), (1, 128))


def _ours(config: AttentionConfig, parallel: bool, operands: Operands) -> torch.Tensor:
    return causal._launch(*operands, None, None, causal.Kind(), config, parallel=parallel)


def _time(
    table: Table, kind: str, batch: int, context: int, configs: Mapping[str, AttentionConfig]
) -> None:
    cases = operands(batch, context if kind == "prefill" else 1, context)
    variants = sdpa.backends(cases)
    stock = list(variants)
    for name, config in configs.items():
        run = partial(_ours, config, kind == "decode")
        variants[name] = [partial(run, case) for case in cases]
    times = medians_us(variants)
    best_us = min(times[name] for name in stock)
    for name, us in times.items():
        table.add(
            kind=kind, batch=batch, context=context, config=name, us=us, ratio=best_us / us
        )  # fmt: skip
    ratios = {name: round(best_us / times[name], 3) for name in configs}
    print(kind, batch, context, f"{best_us:.1f} us", ratios, flush=True)


def tune(out: Path, *kinds: str) -> None:
    kinds = kinds or ("decode", "prefill")
    tiles = {str(tile): replace(SHIPPED, few=tile, many=tile) for tile in TILES}
    for kind in kinds:
        table = Table(out / f"tune_attention_{kind}.csv", echo=False)
        for batch, context in DECODE if kind == "decode" else PREFILL:
            _time(table, kind, batch, context, CLASSES | tiles if kind == "decode" else CLASSES)


if __name__ == "__main__":
    tune(Path(sys.argv[1]), *sys.argv[2:])
