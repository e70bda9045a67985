"""Decode steps of a model that ranks share, by batch size: medians of captured steps, every arm.

    torchrun --nproc-per-node 2 -m bench.models.rank_steps MODEL --tp 2 --out steps.csv

MODEL is a folder with a config.json, whose weights are drawn from seed 0. Every rank runs this; the
first writes. With --tp-groups, and of FP8 weights, the invariant arm alone: stock knows no groups,
and of FP8 no step on ranks that could be captured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench.models.decode import step_ms
from bench.table import Table
from ndcheck import ranks
from ndcheck.records import Arm
from ndcheck.request import make_spec
from ndcheck.samplers.local.checkpoint.quantised import has_fp8_layers
from ndcheck.samplers.local.sampler import TransformersSampler


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--tp-groups", type=int)
    parser.add_argument("--batches", default="1,8,32,64,128,256")
    options = parser.parse_args()
    spec = make_spec(
        model=options.model, random_weights=0, axes="batch-size", loads=options.batches,
        kernels="invariant" if options.tp_groups else "stock,invariant",
        tp=options.tp, tp_groups=options.tp_groups,
    )  # fmt: skip
    ranks.check_ranks(spec)
    sampler = TransformersSampler(spec)
    is_alone = options.tp_groups is not None or has_fp8_layers(sampler.model)
    arms: tuple[Arm, ...] = ("invariant",) if is_alone else ("invariant", "stock")
    table = Table(options.out) if ranks.rank() == 0 else None
    for batch in map(int, options.batches.split(",")):
        found = {arm: step_ms(sampler, arm, batch) for arm in arms}
        if table is not None:
            stock = found.get("stock")
            table.add(
                tp=options.tp, groups=options.tp_groups or "", batch=batch,
                invariant_ms=found["invariant"], stock_ms=stock or "",
                slowdown=found["invariant"] / stock if stock else "",
            )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    sampler.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
