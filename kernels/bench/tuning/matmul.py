"""Times every candidate configuration of every GEMM cell; the frozen tables are chosen from it.

    PYTHONPATH=kernels python -m bench.tuning.matmul OUT_DIR [SECONDS]

A candidate that gives other bits than the rest of its K-grouping is printed as WRONG.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from bench.ops.matmul_cells import BATCHES, SHAPES
from bench.table import Table
from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.candidates import CANDIDATES, candidates, variants
from ndcheck_kernels.cuda.configs import MatmulConfig
from ndcheck_kernels.cuda.products import matmul
from ndcheck_kernels.measure.resources import SHARED_LIMIT, compiling, resources
from ndcheck_kernels.measure.timing import Launches, copies, medians_us

GROUPS = {"qkv 70B TP8": (1, 2, 4)}


def fits(config: MatmulConfig, groups: int) -> bool:
    """Compile without the GPU; the disk cache then serves the timing run."""
    x, w = (torch.empty(4096, 4096, dtype=torch.bfloat16) for _ in range(2))
    with compiling(90) as kernels:
        matmul._launch(x, w.t(), None, 1.0, 1.0, None, config, groups)
    used = resources(kernels[0])
    return used.spilled_bytes == 0 and used.shared_bytes <= SHARED_LIMIT[90]


def _stock(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.t()


def _ours(config: MatmulConfig, groups: int, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return matmul._launch(x, w.t(), None, 1.0, 1.0, None, config, groups)


def tune(out: Path, seconds: float) -> None:
    pairs = [(v, g) for _, _, c in CANDIDATES for g in (1, 2, 4) for v in variants(c, g)]
    with ProcessPoolExecutor(14, multiprocessing.get_context("fork")) as pool:
        usable = {
            p for p, ok in zip(pairs, pool.map(fits, *zip(*pairs, strict=True)), strict=True) if ok
        }
    print(f"{len(usable)} of {len(pairs)} candidates fit", flush=True)
    device._COUNTERS = 1 << 25  # every captured launch keeps its own
    table = Table(out / "tune_matmul.csv", echo=False)
    deadline = time.monotonic() + seconds
    for shape, (n, k) in SHAPES.items():
        weights = [
            torch.randn(n, k, device="cuda").mul_(0.02).bfloat16() for _ in range(copies(2 * n * k))
        ]
        scale = torch.randint(-6, 7, (8192, k), device="cuda").float().exp2()
        tokens = (torch.randn(8192, k, device="cuda") * scale).bfloat16()
        exact = tokens[:4].double() @ weights[0].double().t()
        first: dict[int, torch.Tensor] = {}
        for m in BATCHES:
            if time.monotonic() > deadline:
                print("out of time", flush=True)
                return
            x = tokens[:m]
            launches: dict[str, Launches] = {"stock": [partial(_stock, x, w) for w in weights]}
            for groups in GROUPS.get(shape, (1,)):
                for config in (v for c in candidates(m) for v in variants(c, groups)):
                    if (config, groups) not in usable:
                        continue
                    run = partial(_ours, config, groups)
                    y = run(x, weights[0])
                    seen = first.setdefault(groups, y[:1].clone())
                    error = ((y[:4].double() - exact[:m]).norm() / exact[:m].norm()).item()
                    if not torch.equal(seen, y[:1]) or not error < 1e-2:
                        print("WRONG", shape, m, groups, config.label, error, flush=True)
                    name = f"S={groups} {config.label}"
                    launches[name] = [partial(run, x, w) for w in weights]
            times = medians_us(launches)
            for name, us in times.items():
                table.add(shape=shape, n=n, k=k, m=m, config=name, us=us, ratio=times["stock"] / us)
        del weights, tokens


if __name__ == "__main__":
    tune(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1e9)
