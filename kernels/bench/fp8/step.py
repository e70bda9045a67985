"""Forms of the FP8 8B's decode step against each other in one process, after their bits.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.fp8.step OUT_DIR [--seconds 100] [--channel]

`apart` quantises what attention gives in a launch of its own, `shipped` is the step as it is; the
others change a schedule of it. Writes `forms.csv`, all forms twice; then compares bits of all
schedules and times products alone by each (`products.tune`) for as long as time is left. With
--channel: of the 8B with a scale an output, `forms_channel.csv` alone, its step unfused last.
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
from ndcheck_kernels.cuda.products.fp8.fp8_configs import Fp8Config
from ndcheck_kernels.cuda.products.fp8.fp8_matmul import fp8_matmul
from ndcheck_kernels.cuda.rows import quantise
from ndcheck_kernels.cuda.rows.quantise import OneScale, Quantised, quantise_rows
from ndcheck_kernels.models import decoder
from ndcheck_kernels.ops import row_fp8

BY_ROW = "tests/kernels/triton/fp8/test_row_fp8.py"
TESTS = (
    "tests/kernels/gpu/test_fp8_fused_bits.py",
    f"{BY_ROW}::test_quotients_next_to_a_tie_are_rounded_once",
)
CHANNEL_TESTS = (
    "tests/kernels/triton/fp8/test_projections.py",
    f"{BY_ROW}::test_rows_are_quantised_as_on_the_cpu",
    f"{BY_ROW}::test_fused_quantisation_costs_no_bits",
)
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
WHOLE_ROWS: Change = (quantise, "_FEW_ROWS", 0)
UNFUSED: Change = (decoder, "join_weights", lambda model: [])
CHANNEL: dict[str, tuple[Change, ...]] = {
    "shipped": (),
    "one program a row": (WHOLE_ROWS,),
    "unfused": (UNFUSED,),
}
CHANNEL_FORMS = dict.fromkeys((1, 8, 32, 128), CHANNEL)


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
            fp8_matmul(*codes, *weight, addend)
    torch.cuda.synchronize()


def compile_channel() -> None:
    compile_each(_compile_channel, CHANNEL_FORMS)


def _compile_channel(batch: int) -> None:
    for n, k in products.SHAPES.values():
        rows = torch.ones(batch, k, device="cuda").bfloat16()
        weight = row_fp8.quantise_weight(torch.ones(n, k, device="cuda"), n)
        addend = torch.ones(batch, n, device="cuda").bfloat16() if n == k or k > n else None
        fp8_matmul(*quantise_rows(rows, one_scale=OneScale()), *weight, addend)
    torch.cuda.synchronize()


def compare_forms(
    path: Path,
    shape: str = "qwen3-8b-fp8",
    by_batch: dict[int, dict[str, tuple[Change, ...]]] = FORMS,
) -> None:
    sampler, table = open_model(shape), Table(path)
    for turn in (1, 2):
        for batch, forms in by_batch.items():
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
    parser.add_argument("--channel", action="store_true", help="with a scale an output")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    parts: list[tuple[str, Callable[[], None]]] = [
        ("compiling", compile_forms),
        ("bits", lambda: run_tests(out / "forms_tests.txt", TESTS)),
        ("forms", lambda: compare_forms(out / "forms.csv")),
        ("compiling schedules", products.compile_schedules),
        ("bits of schedules", lambda: compare_schedules(out, products.every_schedule())),
        ("schedules", lambda: products.tune(out)),
    ]
    if options.channel:
        path = out / "forms_channel.csv"
        parts = [
            ("compiling", compile_channel),
            ("bits", lambda: run_tests(out / "forms_tests.txt", (*TESTS, *CHANNEL_TESTS))),
            ("forms", lambda: compare_forms(path, "qwen3-8b-fp8-channel", CHANNEL_FORMS)),
        ]
    return run_parts(parts, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
