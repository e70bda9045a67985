"""FP8 products in blocks of 128 x 128: one bit class, and times beside torch._scaled_mm.

    PYTHONPATH=kernels python -m bench.fp8.products OUT_DIR

`stock` is torch._scaled_mm with the same blocks where it has them for these operands, `by_row` with
one scale a row of each operand, which is less work; both of rows that are quantised already.
`quantised` is ours with the quantisation of its rows, as an unfused layer runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path

import torch

from bench.parts import compile_each
from bench.table import Table, add_ranked, print_means
from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.products.fp8 import fp8_configs, fp8_matmul
from ndcheck_kernels.cuda.products.fp8.fp8_configs import Fp8Config
from ndcheck_kernels.cuda.rows.quantise import quantise_rows
from ndcheck_kernels.measure.timing import copies, medians_us
from ndcheck_kernels.ops.block_fp8 import quantise_weight

SHAPES = {
    "qkv 8B": (6144, 4096),
    "o 8B": (4096, 4096),
    "gate_up 8B": (24576, 4096),
    "down 8B": (4096, 12288),
}
BATCHES = (1, 8, 16, 64, 256, 1024, 4096)
SERVES = {1: 4, 128: 128, 16: 16, 32: 32, 64: 64, 256: 256, 1024: 1024, 4096: 1 << 62}
"""Numbers of rows at which schedules are tried, and up to which the fastest one serves."""
SCHEDULES = [
    Fp8Config(*sizes, stages, swap=swap, parallel=parallel)
    for *sizes, swap, all_stages, can_be_parallel in (
        (16, 64, 4, True, (4, 6, 10), True),
        (16, 128, 4, True, (3, 5), True),
        (32, 64, 4, True, (4, 6, 8), True),
        (32, 128, 4, True, (4,), True),
        (64, 32, 4, False, (6, 8, 12), True),
        (64, 64, 4, True, (3, 4, 6, 12), True),
        (64, 128, 4, False, (3, 4, 6, 8), True),
        (128, 64, 4, True, (3, 4), False),
        (128, 128, 8, False, (3, 4), False),
    )
    for stages, parallel in product(all_stages, (False, True) if can_be_parallel else (False,))
]
BY_HAND = tuple(
    Fp8Config(*sizes, hopper=True)
    for sizes in (
        (64, 32, 4, 16),
        (64, 64, 4, 12),
        (64, 128, 4, 8),
        (128, 32, 4, 10),
        (128, 64, 8, 8),
        (128, 128, 8, 4),
        (128, 128, 8, 6),
    )
)
"""Schedules of `block_fp8_hopper`."""


def every_schedule() -> tuple[Fp8Config, ...]:
    """All that are tried, and all that are shipped."""
    return tuple(dict.fromkeys((*fp8_configs.selectable_configs(90), *SCHEDULES)))


def compile_shipped() -> None:
    compile_each(_compile, fp8_configs.selectable_configs(90))


def compile_schedules() -> None:
    compile_each(_compile, every_schedule())


def _compile(config: Fp8Config) -> None:
    for k, m in product((4096, 12288), (1, 129)):
        rows = torch.ones(m, k, device="cuda").bfloat16()
        operands = (*quantise_rows(rows), *quantise_weight(torch.ones(256, k, device="cuda")))
        launch = partial(fp8_matmul._launch, *operands, config=config)
        for dtype, addend in (
            (rows.dtype, None),
            (rows.dtype, rows[:, :256]),
            (torch.float32, None),
        ):
            launch(addend=addend, dtype=dtype)
    torch.cuda.synchronize()


def weights(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise_weight(torch.randn(n, k, device="cuda") * 0.02)


def find_differences(out: Path, configs: tuple[Fp8Config, ...] = ()) -> list[str]:
    """Configurations that give other bits, of operands that cancel; and a control.

    Writes a row for each: a configuration passes if every row of 600 has the bits of the first.
    Without ``configs`` all that can be selected are tried.
    """
    configs = configs or fp8_configs.selectable_configs(90)
    table, differing = Table(out / "block_fp8_bits.csv", echo=False), []
    for n, k in ((1024, 4096), (1008, 3984), (384, 12288)):
        half = torch.randn(600, k // 2, device="cuda")
        half *= torch.randint(-5, 6, half.shape, device="cuda").exp2()
        order = torch.randperm(k, device="cuda")
        w = torch.randn(n, k // 2, device="cuda")
        operands = (
            *quantise_rows(torch.cat([half, half], 1)[:, order].bfloat16()),
            *quantise_weight(torch.cat([w, -w], 1)[:, order]),
        )
        expected = some_rows(operands, fp8_configs.selectable_configs(90)[0], 0, 600)
        for config in configs:
            same = all(
                torch.equal(some_rows(operands, config, first, count), expected[first:][:count])
                for first, count in ((0, 600), (7, 1), (100, 17), (5, 129), (299, 300))
            )
            table.add(n=n, k=k, config=str(config), equal=same)
            if not same:
                differing.append(f"{n}x{k} {config}")
        backwards = tuple(each.flip(1) for each in operands)
        if torch.equal(some_rows(backwards, configs[0], 0, 600), expected):
            differing.append(f"{n}x{k}: the control, K backwards, has the same bits")
    return differing


def some_rows(
    operands: tuple[torch.Tensor, ...], config: Fp8Config, first: int, count: int
) -> torch.Tensor:
    """The product of ``count`` rows, in float32."""
    codes, row_scales, weight, scales = operands
    return fp8_matmul._launch(
        codes[first:][:count].contiguous(), row_scales[first:][:count].t().contiguous().t(),
        weight.contiguous(), scales.contiguous(), None, torch.float32, config,
    )  # fmt: skip


def stock(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    return torch._scaled_mm(
        codes, weight.t(), scale_a=row_scales, scale_b=scales.t(), out_dtype=torch.bfloat16
    )


def by_row(m: int, n: int) -> Callable[..., torch.Tensor]:
    """The product of m rows with n, all of one scale."""
    left, right = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")

    def call(codes: torch.Tensor, _: object, weight: torch.Tensor, __: object) -> torch.Tensor:
        return torch._scaled_mm(codes, weight.t(), left, right, out_dtype=torch.bfloat16)

    return call


def runs(call: Callable[[], object]) -> str:
    """Empty, or why torch does not take these operands."""
    try:
        call()
    except Exception as error:
        return str(error).strip().splitlines()[0][:150]
    return ""


def bench(out: Path, batches: tuple[int, ...] = BATCHES) -> None:
    """Few rows of every shape first, and the means of what there is after each number of rows."""
    table, refused = Table(out / "block_fp8.csv", echo=False), ""
    for m in batches:
        for shape, (n, k) in SHAPES.items():
            held = [weights(n, k) for _ in range(copies(n * k))]
            refused = _compare(table, shape, m, held) or refused
        print_means(table, ("ratio", "by_row_ratio"))
    print(refused, flush=True)


def _compare(
    table: Table, shape: str, m: int, held: list[tuple[torch.Tensor, torch.Tensor]]
) -> str:
    """Add a row of times; says what torch refused."""
    refused, (n, k) = "", held[0][0].shape
    x = torch.randn(m, k, device="cuda").bfloat16()
    codes = quantise_rows(x)
    variants = {
        "ours": [partial(fp8_matmul.fp8_matmul, *codes, *each) for each in held],
        "quantised": [partial(_quantised, x, *each) for each in held],
    }
    for name, call in (("stock", stock), ("by_row", by_row(m, n))):
        if reason := runs(partial(call, *codes, *held[0])):
            refused = f"{name}: {reason}"
        else:
            variants[name] = [partial(call, *codes, *each) for each in held]
    us = medians_us(variants)
    error = (
        (_quantised(x, *held[0]) - stock(*codes, *held[0])).abs().max().item()
        if ("stock" in variants)
        else ""
    )
    table.add(
        shape=shape, n=n, k=k, m=m, us=us["ours"], quantised_us=us["quantised"],
        stock_us=us.get("stock", ""), by_row_us=us.get("by_row", ""),
        ratio=us["stock"] / us["ours"] if "stock" in us else "",
        by_row_ratio=us["by_row"] / us["ours"] if "by_row" in us else "",
        tflop_per_s=2 * m * n * k / us["ours"] / 1e6,
        gb_per_s=(n * k + m * k + 2 * m * n) / us["ours"] / 1e3, largest_difference=error,
    )  # fmt: skip
    print(*(f"{v:.3f}" if isinstance(v, float) else v for v in table.rows[-1].values()),
          flush=True)  # fmt: skip
    return refused


def _quantised(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return fp8_matmul.fp8_matmul(*quantise_rows(x), weight, scales)


def schedule_times(m: int, n: int, k: int, configs: Iterable[Fp8Config]) -> dict[str, float]:
    """Medians in us, by the schedules as text."""
    held = [weights(n, k) for _ in range(copies(n * k))]
    codes = quantise_rows(torch.randn(m, k, device="cuda").bfloat16())
    us = medians_us({
        str(config): [
            partial(fp8_matmul._launch, *codes, *each, None, torch.bfloat16, config)
            for each in held
        ]
        for config in configs
    })  # fmt: skip
    device._pools.clear()  # Its graphs are gone, and with them what their counters counted.
    return us


def tune(out: Path) -> None:
    """Try the schedules of each shape by number of rows; prints the fastest as `MEASURED`."""
    table = Table(out / "block_fp8_schedules.csv", echo=False)
    fastest: dict[tuple[int, int], dict[int, str]] = {}
    for (m, most), (shape, (n, k)) in product(SERVES.items(), SHAPES.items()):
        us = schedule_times(m, n, k, [c for c in SCHEDULES if is_worth_trying(c, m, n)])
        add_ranked(table, shape, m, us, str(fp8_configs.product_config(m, n, k, 90)))
        fastest.setdefault((n, k), {})[most] = min(us, key=us.__getitem__)
        print(shape, m, fastest[n, k][most], flush=True)
    measured = {each: sorted(by_rows.items()) for each, by_rows in fastest.items()}
    print(f"MEASURED = {measured}", flush=True)


def is_worth_trying(config: Fp8Config, m: int, n: int) -> bool:
    """Not tiles that are mostly empty, nor many programs that leave their sums to others."""
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    fits = config.block_m >= 64 if m > 64 else config.block_m == max(16, m)
    return fits and not (config.parallel and m > 64 and tiles > 264)


if __name__ == "__main__":
    OUT = Path(sys.argv[1])
    OUT.mkdir(parents=True, exist_ok=True)
    found = find_differences(OUT)
    print("\n".join(found) or "one bit class", flush=True)
    bench(OUT)
    sys.exit(bool(found))
