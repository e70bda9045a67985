"""Forms of the FP8 8B's decode step against each other in one process, after their bits.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.fp8.step OUT_DIR [--seconds 100]

`apart` quantises what attention gives in a launch of its own, `shipped` is the step as it is; the
others change a schedule of it. Writes `forms.csv`, all forms twice; then compares bits of all
schedules and times products alone by each (`products.tune`) for as long as time is left.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.fp8 import products
from bench.fp8.measure import compare_schedules, open_model
from bench.models.decode import step_ms
from bench.parts import compile_each, run_parts, run_tests
from bench.table import Table
from ndcheck_kernels.cuda.attention.causal import attention, quantised_attention
from ndcheck_kernels.cuda.products.fp8 import fp8_configs
from ndcheck_kernels.cuda.products.fp8.block_fp8 import block_fp8_matmul
from ndcheck_kernels.cuda.products.fp8.fp8_configs import Fp8Config
from ndcheck_kernels.cuda.rows.quantise import Quantised, quantise_rows
from ndcheck_kernels.models import decoder

TESTS = ("tests/kernels/gpu/test_fp8_fused_bits.py",)
QKV, OUT, GATE_UP, DOWN = products.SHAPES.values()
Change = tuple[Any, str, Any]
"""An object, its attribute, and what takes its place."""


def attention_apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **seen: Any) -> Quantised:
    out = attention(q, k, v, **seen)
    return quantise_rows(out.transpose(1, 2).reshape(q.shape[0] * q.shape[2], -1))


ATTENTION: Change = (decoder, "quantised_attention", attention_apart)


def one_schedule(config: Fp8Config, *shapes: tuple[int, int]) -> Change:
    tables = dict.fromkeys(shapes, ((1 << 62, config),))
    return fp8_configs, "MEASURED", fp8_configs.MEASURED | tables


FEW: dict[str, tuple[Change, ...]] = {"apart": (ATTENTION,), "shipped": ()}
MANY = FEW | {
    "gate_up 64 x 128, 6 stages": (one_schedule(Fp8Config(64, 128, 4, 6), GATE_UP),),
    "qkv, o, down 64 x 32": (one_schedule(Fp8Config(64, 32, 4, 8), QKV, OUT, DOWN),),
}
FORMS = {1: FEW, 128: MANY, 8: FEW, 32: FEW}


@contextmanager
def changed(changes: tuple[Change, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for where, name, value in changes:
            stack.enter_context(patch.object(where, name, value))
        yield


def compile_forms() -> None:
    """Products and attention of each form, in other processes."""
    each = [(batch, name) for batch, forms in FORMS.items() for name in forms]
    compile_each(_compile, *zip(*each, strict=True))


def _compile(batch: int, name: str) -> None:
    if name == "shipped":
        q = torch.ones(batch, 32, 1, 128, device="cuda").bfloat16()
        limits = torch.ones(batch, dtype=torch.int32, device="cuda")
        for columns in (176, 3000):
            kv = torch.ones(batch, 8, columns, 128, device="cuda").bfloat16()
            for attend in (quantised_attention, attention_apart):
                attend(q, kv, kv, starts=limits - 1, lengths=limits, scale=1.0)
    with changed(FORMS[batch][name]):
        for n, k in products.SHAPES.values():
            weight = products.weights(n, k)
            codes = quantise_rows(torch.ones(batch, k, device="cuda").bfloat16())
            addend = torch.ones(batch, n, device="cuda").bfloat16() if n == k or k > n else None
            block_fp8_matmul(*codes, *weight, addend)
    torch.cuda.synchronize()


def compare_forms(out: Path) -> None:
    sampler, table = open_model("qwen3-8b-fp8"), Table(out / "forms.csv")
    for turn in (1, 2):
        for batch, forms in FORMS.items():
            for name, changes in forms.items():
                with changed(changes):
                    ms = step_ms(sampler, "invariant", batch)
                table.add(batch=batch, form=name, turn=turn, ms=ms)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=100, help="when to stop")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    parts: list[tuple[str, Callable[[], None]]] = [
        ("compiling", compile_forms),
        ("bits", lambda: run_tests(out / "forms_tests.txt", TESTS)),
        ("forms", lambda: compare_forms(out)),
        ("compiling schedules", products.compile_schedules),
        ("bits of schedules", lambda: compare_schedules(out, products.every_schedule())),
        ("schedules", lambda: products.tune(out)),
    ]
    return run_parts(parts, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
