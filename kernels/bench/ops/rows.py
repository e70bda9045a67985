"""Row operations beside torch's, in GB/s and as a share of the copy bandwidth.

    PYTHONPATH=kernels python -m bench.ops.rows OUT_DIR

Bytes are what the operation must move: each input read once, each output written once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from bench.table import Table
from ndcheck_kernels.cuda.rows import layer_norm, reductions, rms_norm, silu_mul, softmax
from ndcheck_kernels.measure.timing import copies, copy_gb_per_s, medians_us

HIDDEN = ((1, 4096), (64, 4096), (1024, 4096), (16384, 4096), (8192, 8192))
VOCABULARY = ((1, 151936), (64, 151936), (1024, 151936))

Op = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]  # rows x, rows y, one row w


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    passes: int
    """How often the bytes of [M, N] are moved."""
    ours: Op
    stock: Op
    shapes: tuple[tuple[int, int], ...] = HIDDEN


CASES = (
    Case(
        "rms_norm", 2, lambda x, y, w: rms_norm.rms_norm(x, w),
        lambda x, y, w: F.rms_norm(x, w.shape, w, 1e-6),
    ),
    Case(
        "add_rms_norm", 4, lambda x, y, w: rms_norm.add_rms_norm(x, y, w),
        lambda x, y, w: F.rms_norm(x + y, w.shape, w, 1e-6),
    ),
    Case(
        "layer_norm", 2, lambda x, y, w: layer_norm.layer_norm(x, w, w),
        lambda x, y, w: F.layer_norm(x, w.shape, w, w),
    ),
    Case(
        "silu_mul", 3, lambda x, y, w: silu_mul.silu_mul(x, y), lambda x, y, w: F.silu(x) * y,
    ),
    Case("sum", 1, lambda x, y, w: reductions.sum(x, -1), lambda x, y, w: x.sum(-1)),
    Case(
        "softmax", 2, lambda x, y, w: softmax.softmax(x), lambda x, y, w: x.softmax(-1),
        HIDDEN + VOCABULARY,
    ),
    Case(
        "log_softmax", 2, lambda x, y, w: softmax.log_softmax(x),
        lambda x, y, w: x.log_softmax(-1), HIDDEN + VOCABULARY,
    ),
    Case(
        "logsumexp", 1, lambda x, y, w: softmax.logsumexp(x), lambda x, y, w: x.logsumexp(-1),
        VOCABULARY,
    ),
    Case(
        "argmax", 1, lambda x, y, w: reductions.argmax(x, -1), lambda x, y, w: x.argmax(-1),
        VOCABULARY,
    ),
)  # fmt: skip


def bench(out: Path) -> None:
    table = Table(out / "rows.csv")
    copy = copy_gb_per_s()
    for case in CASES:
        for m, n in case.shapes:
            w = torch.randn(n, dtype=torch.bfloat16, device="cuda")
            rows = [
                tuple(torch.randn(m, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
                for _ in range(copies(2 * m * n))
            ]
            times = medians_us(
                {
                    "ours": [partial(case.ours, *r, w) for r in rows],
                    "stock": [partial(case.stock, *r, w) for r in rows],
                }
            )
            us, stock_us = times["ours"], times["stock"]
            gb_per_s = case.passes * 2 * m * n / us / 1000
            table.add(
                op=case.name, m=m, n=n, us=us, stock_us=stock_us, ratio=stock_us / us,
                gb_per_s=gb_per_s, copy_gb_per_s=copy, share_of_copy=gb_per_s / copy,
            )  # fmt: skip


if __name__ == "__main__":
    bench(Path(sys.argv[1]))
