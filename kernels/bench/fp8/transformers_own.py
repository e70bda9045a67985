"""FP8 products beside those that transformers had in its package, up to 5.1.

    PYTHONPATH=kernels python -m bench.fp8.transformers_own OUT_DIR FILE

FILE is `transformers/integrations/finegrained_fp8.py` of the wheel of such a release, such as
4.57.6; later ones take their kernels from a hub. Rows are quantised already; their scales lie row
by row there, as transformers' own quantisation leaves them. Writes transformers.csv.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.fp8.products import BATCHES, SHAPES, compile_shipped, weights
from bench.table import Table, print_means
from ndcheck_kernels.cuda.products.fp8.fp8_matmul import fp8_matmul
from ndcheck_kernels.cuda.rows.quantise import quantise_rows
from ndcheck_kernels.measure.timing import copies, medians_us

BLOCK = [128, 128]


def load_product(file: Path) -> Callable[..., torch.Tensor]:
    """Its product, read as a module of the installed transformers, whose names it imports."""
    spec = importlib.util.spec_from_file_location("transformers.integrations.own_fp8", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[..., torch.Tensor] = module.w8a8_block_fp8_matmul_triton
    return found


def main(out: Path, file: Path) -> int:
    theirs = load_product(file)
    compile_shipped()
    out.mkdir(parents=True, exist_ok=True)
    table = Table(out / "transformers.csv")
    for m in BATCHES:
        for shape, (n, k) in SHAPES.items():
            held = [weights(n, k) for _ in range(copies(n * k))]
            codes, scales = quantise_rows(torch.randn(m, k, device="cuda").bfloat16())
            product = partial(
                theirs, codes, As=scales.contiguous(), block_size=BLOCK, output_dtype=torch.bfloat16
            )
            of_theirs = [partial(product, weight, Bs=their_scales) for weight, their_scales in held]
            want = fp8_matmul(codes, scales, *held[0]).float()
            error = ((of_theirs[0]().float() - want).norm() / want.norm()).item()
            if not error < 0.01:
                raise ArithmeticError(f"{shape} at {m} rows is off by {error:.3g}")
            us = medians_us({
                "ours": [partial(fp8_matmul, codes, scales, *each) for each in held],
                "theirs": of_theirs,
            })  # fmt: skip
            table.add(
                shape=shape, n=n, k=k, m=m, us=us["ours"], transformers_us=us["theirs"],
                ratio=us["theirs"] / us["ours"], error=error,
            )  # fmt: skip
    print_means(table, ("ratio",))
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
