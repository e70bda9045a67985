"""cuBLASLt without split-K beside our kernels and stock torch.mm: the same bits? which is faster?

    PYTHONPATH=kernels python -m bench.ops.borrowed OUT_DIR [SECONDS]

First every shape and number of rows is proven as `cuda.products.borrowed` does it, alone and with
an addend, in bfloat16 and some in float16 (borrowed_bits.csv); then each cell is timed, all sources
in turn (borrowed.csv, from which `freeze_borrowed` makes the frozen ranges). It ends in time.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from bench.ops.matmul_cells import BATCHES, SHAPES
from bench.table import Table
from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import k_groups, matmul_config
from ndcheck_kernels.cuda.products import borrowed, cublaslt, matmul, proofs
from ndcheck_kernels.measure.resources import compiling
from ndcheck_kernels.measure.timing import Launches, copies, medians_us

# Shapes of Qwen2.5-7B, of a 2B and of a small model's output layer.
MORE = {
    "qkv 7B": (4608, 3584),
    "gate_up 7B": (37888, 3584),
    "down 7B": (3584, 18944),
    "square 2B": (2048, 2048),
    "lm_head small": (49152, 576),
}
ALL = SHAPES | MORE
# Heuristics change their mind anywhere: beside the powers, their neighbours.
ROWS = tuple(sorted({*BATCHES, 3, 17, 33, 65, 96, 129, 192, 257, 384, 513, 1025}))
# Where most is to be gained comes first, should time run out.
TIMED_ROWS = (256, 128, 512, 64, 1024, 4096, 2048, 32, 8192, 16, 1, 8, 4, 2)
WITH_RESIDUAL = ("o 8B", "down 8B", "down 7B", "o 70B TP8")
MOST_OUTPUTS = 2**29
FP16_ROWS = (1, 64, 257, 1024)


def cells(rows: tuple[int, ...]) -> Iterator[tuple[str, int, int, int]]:
    for m in rows:
        for name, (n, k) in ALL.items():
            if m * n <= MOST_OUTPUTS:
                yield name, n, k, m


def ours(n: int, k: int, m: int) -> borrowed.Ours:
    """Our kernel as the tables choose it, whatever is borrowed."""
    groups = k_groups(n, k, 2, 90)
    config = matmul_config(m, n, k, 2, 90)

    def compute(
        x: torch.Tensor, w: torch.Tensor, addend: torch.Tensor | None = None
    ) -> torch.Tensor:
        return matmul._launch(x, w.t(), addend, 1.0, 1.0, None, config, groups)

    return compute


def compile_one(n: int, k: int, m: int, dtype: torch.dtype, has_addend: bool) -> None:
    """Without the GPU; the disk cache then serves the launches."""
    x, w = (torch.empty(rows, k, dtype=dtype) for rows in (m, n))
    with compiling(90):
        ours(n, k, m)(x, w, torch.empty(m, n, dtype=dtype) if has_addend else None)


def compile_ahead() -> None:
    """Every configuration that the tables choose, in processes: before CUDA is touched."""
    work = {}
    for _, n, k, m in cells(ROWS):
        config, groups = matmul_config(m, n, k, 2, 90), k_groups(n, k, 2, 90)
        for dtype in (torch.bfloat16, torch.float16):
            for has_addend in (False, True):
                work[config, groups, dtype, has_addend] = (n, k, m, dtype, has_addend)
    with ProcessPoolExecutor(14, multiprocessing.get_context("fork")) as pool:
        list(pool.map(compile_one, *zip(*work.values(), strict=True)))


def prove(out: Path, deadline: float) -> None:
    table = Table(out / "borrowed_bits.csv", echo=False)
    where = torch.device("cuda", torch.cuda.current_device())
    counts = [0, 0]
    for name, n, k, m in cells(ROWS):
        groups = k_groups(n, k, 2, 90)
        for dtype in ("bfloat16", "float16"):
            if dtype == "float16" and m not in FP16_ROWS:
                continue
            for has_addend in (False, True) if groups == 1 else (False,):
                shape = proofs.Shape(n, k, dtype, groups, has_addend)
                reason = borrowed.prove(shape, m, where, ours(n, k, m))
                form = "addend" if has_addend else "plain"
                table.add(name=name, n=n, k=k, m=m, dtype=dtype, form=form, reason=reason or "")
                counts[reason is None] += 1
                if reason is not None:
                    print(f"{shape}, {m} rows: {reason}", flush=True)
        if time.monotonic() > deadline:
            print("out of time while proving")
            return
    print(f"bits: {counts[1]} the same, {counts[0]} not")


def without_split_k(x: torch.Tensor, w: torch.Tensor) -> bool | None:
    """Whether torch.mm with its own flags has the bits of ours by cuBLASLt; None: no such flags."""
    was = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    library = torch.backends.cuda.preferred_blas_library()
    try:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
        torch.backends.cuda.preferred_blas_library("cublaslt")
        got = x @ w.t()
    except (RuntimeError, TypeError):
        return None
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = was
        torch.backends.cuda.preferred_blas_library(library)
    return torch.equal(got, cublaslt.product(x, w, torch.empty_like(got)))


def measure(out: Path, deadline: float) -> None:
    table = Table(out / "borrowed.csv")
    forms = [("plain", cell) for cell in cells(TIMED_ROWS)]
    forms += [("addend", cell) for cell in cells(TIMED_ROWS) if cell[0] in WITH_RESIDUAL]
    for form, (name, n, k, m) in forms:
        if time.monotonic() > deadline:
            print("out of time while timing")
            return
        groups = k_groups(n, k, 2, 90)
        count = copies(2 * (n * k + m * k + 2 * m * n))
        x, w, c = (
            torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((m, k), (n, k), (m, n))
        )
        rotated = [tuple(t.clone() for t in (x, w, c)) for _ in range(count)]
        compute = ours(n, k, m)

        def borrow(
            x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None, groups: int = groups
        ) -> torch.Tensor:
            return borrowed.product(x, w, x.new_empty(len(x), len(w)), c, groups)

        def stock(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
            return x @ w.t() if c is None else torch.addmm(c, x, w.t())

        launches: dict[str, Launches] = {
            source: [partial(f, x, w, c if form == "addend" else None) for x, w, c in rotated]
            for source, f in (("ours_us", compute), ("cublas_us", borrow), ("stock_us", stock))
        }
        flags = without_split_k(x, w) if groups == 1 and form == "plain" else ""
        table.add(name=name, n=n, k=k, m=m, form=form, **medians_us(launches), flags_same=flags)
        del rotated, launches


def main(out: Path, seconds: float = 440) -> None:
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    compile_ahead()
    print(f"compiled after {time.monotonic() - started:.0f} s", flush=True)
    where = torch.device("cuda", torch.cuda.current_device())
    here = proofs.environment(where) | {"capability": str(device.capability(where))}
    (out / "environment.json").write_text(json.dumps(here, indent=1))
    print(here, flush=True)
    prove(out, started + 0.6 * seconds)
    print(f"proven after {time.monotonic() - started:.0f} s", flush=True)
    measure(out, started + seconds)
    print(f"done after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(float, sys.argv[2:]))
