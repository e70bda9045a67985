"""The shipped GEMM beside torch.mm, cell by cell.

PYTHONPATH=kernels python -m bench.ops.matmul OUT_DIR
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import torch

from bench.ops.matmul_cells import BATCHES, SHAPES
from bench.table import Table
from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import k_groups, matmul_config
from ndcheck_kernels.cuda.products import matmul
from ndcheck_kernels.measure.timing import copies, medians_us


def _stock(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, w.t())


def bench(out: Path) -> None:
    table = Table(out / "matmul.csv", echo=False)
    for shape, (n, k) in SHAPES.items():
        weights = [
            torch.randn(n, k, device="cuda").mul_(0.02).bfloat16() for _ in range(copies(2 * n * k))
        ]
        tokens = torch.randn(max(BATCHES), k, device="cuda").bfloat16()
        capability = device.capability(tokens.device)
        for m in BATCHES:
            x = tokens[:m]
            exact = x[:4].double() @ weights[0].double().t()
            error, stock_error = (
                ((op(x, weights[0])[:4].double() - exact).norm() / exact.norm()).item()
                for op in (matmul.linear, _stock)
            )
            times = medians_us(
                {
                    "ours": [partial(matmul.linear, x, w) for w in weights],
                    "stock": [partial(_stock, x, w) for w in weights],
                }
            )
            moved = 2 * (n * k + m * k + m * n)
            table.add(
                shape=shape, n=n, k=k, m=m, groups=k_groups(n, k, 2, capability),
                config=matmul_config(m, n, k, 2, capability).label,
                us=times["ours"], stock_us=times["stock"], ratio=times["stock"] / times["ours"],
                tflop_per_s=2 * m * n * k / times["ours"] / 1e6,
                gb_per_s=moved / times["ours"] / 1e3, error=error, stock_error=stock_error,
            )  # fmt: skip
        print(
            shape, *(f"{r['m']}:{r['ratio']:.3f}" for r in table.rows[-len(BATCHES) :]), flush=True
        )
    ratios = [(int(r["m"]), float(r["ratio"])) for r in table.rows]
    small = [r for m, r in ratios if m <= 16]
    print(
        f"geometric mean {_mean([r for _, r in ratios]):.3f}; M <= 16: {_mean(small):.3f}, "
        f"least {min(small):.3f}; below 0.90: {sum(r < 0.9 for _, r in ratios)} of {len(ratios)}"
    )


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


if __name__ == "__main__":
    bench(Path(sys.argv[1]))
