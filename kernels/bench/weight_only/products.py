"""Products with 4-bit weights: the bits of plain ones, and times beside bf16 and torch's own.

    PYTHONPATH=kernels python -m bench.weight_only.products OUT_DIR

`stock` is torch's product with the plain bf16 weight, `torch_int4` is torch._weight_int4pack_mm, of
the same groups.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.fp8.products import SHAPES, runs
from bench.table import Table, add_ranked, print_means
from ndcheck_kernels.cuda.products import weight_only
from ndcheck_kernels.cuda.products.matmul import matmul
from ndcheck_kernels.cuda.products.weight_only import WeightOnlyConfig, weight_only_matmul
from ndcheck_kernels.measure.timing import copies, medians_us
from ndcheck_kernels.ops.weight_only import Packed, pack

GROUP = 128
BATCHES = (1, 4, 16, 32, 64, 128, 256, 1024, 4096)
SCHEDULES = [
    WeightOnlyConfig(m, n, warps, stages)
    for m, n, warps in (
        *((16, 64, 4), (16, 64, 8), (16, 128, 4), (16, 128, 8)),
        *((32, 64, 4), (32, 128, 8), (64, 64, 4), (64, 64, 8), (64, 128, 8)),
        *((128, 64, 4), (128, 64, 8), (128, 128, 8)),
    )
    for stages in (2, 3, 4, 6, 8)
    if stages * (512 * m + 128 * n) < 215_000 and (stages > 2 or m == 128)
]


def draw(n: int, k: int, group: int = GROUP, bits: int = 4) -> Packed:
    codes = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(k // group, n, device="cuda") * 0.004).bfloat16()
    return Packed(codes, scales, None, None, bits, k)


def cancelling(n: int, k: int, group: int, bits: int) -> tuple[torch.Tensor, Packed]:
    """Rows [600, K] and a weight whose exact product is 0: its bits are the order of the sum."""
    half = torch.randn(600, k // 2, device="cuda")
    half *= torch.randint(-5, 6, half.shape, device="cuda").exp2()
    order = torch.randperm(k, device="cuda")
    codes = torch.randint(1, 1 << bits, (n, k // 2), device="cuda")
    codes = torch.cat([codes, (1 << bits) - codes], 1)[:, order]
    scales = (torch.rand(n, device="cuda") + 0.5).bfloat16().expand(k // group, n).contiguous()
    rows = torch.cat([half, half], 1)[:, order].bfloat16()
    return rows, Packed(pack(codes, bits), scales, None, None, bits, k)


def find_differences(out: Path, configs: tuple[WeightOnlyConfig, ...] = ()) -> list[str]:
    """Configurations that give other bits than `matmul` with the plain weight; and a control."""
    configs = configs or weight_only.selectable_configs()
    table, differing = Table(out / "weight_only_bits.csv", echo=False), []
    shapes = ((6144, 4096, 128, 4), (1024, 12288, 32, 4), (1000, 512, 512, 8), (384, 4096, 64, 8))
    for n, k, group, bits in shapes:
        rows, packed = cancelling(n, k, group, bits)
        plain = weight_only.unpacked(packed, torch.bfloat16)
        for config, m in product(configs, (1, 16, 17, 64, 128, 600)):
            expected = matmul(rows[:m], plain.t())
            same = torch.equal(weight_only._launch(rows[:m], packed, None, config), expected)
            table.add(n=n, k=k, group=group, bits=bits, m=m, config=str(config), equal=same)
            if not same:
                differing.append(f"{n}x{k} of {bits} bits, {m} rows: {config}")
        order = torch.randperm(k, device="cuda")
        shuffled = matmul(rows[:, order].contiguous(), plain[:, order].contiguous().t())
        if torch.equal(shuffled, matmul(rows, plain.t())):
            differing.append(f"{n}x{k}: the control, K in another order, has the same bits")
        differing += [
            f"{n}x{k} of {bits} bits, {m} rows: as shipped"
            for m in (1, 128, 129, 600)
            if not torch.equal(weight_only_matmul(rows[:m], packed), matmul(rows[:m], plain.t()))
        ]
    return differing


def torch_int4(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands of torch's own product: another layout, the same bytes."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scales = torch.rand(k // GROUP, n, 2, device="cuda").bfloat16()
    return torch._convert_weight_to_int4pack(codes, 8), scales


def bench(out: Path, batches: tuple[int, ...] = BATCHES) -> None:
    table, refused = Table(out / "weight_only.csv", echo=False), ""
    for shape, (n, k) in SHAPES.items():
        held = [draw(n, k) for _ in range(copies(n * k / 2))]
        plain = [weight_only.unpacked(w, torch.bfloat16) for w in held[: copies(2 * n * k)]]
        theirs = []
        if not (refused := runs(lambda n=n, k=k: torch_int4(n, k)) or refused):
            theirs = [torch_int4(n, k) for _ in held]
        for m in batches:
            x = torch.randn(m, k, device="cuda").bfloat16()
            variants = {
                "ours": [partial(weight_only_matmul, x, w) for w in held],
                "stock": [partial(F.linear, x, w) for w in plain],
            }
            if theirs and not (
                refused := runs(
                    partial(torch._weight_int4pack_mm, x, theirs[0][0], GROUP, theirs[0][1])
                )
            ):
                variants["torch_int4"] = [
                    partial(torch._weight_int4pack_mm, x, w, GROUP, s) for w, s in theirs
                ]
            us = medians_us(variants)
            table.add(
                shape=shape, n=n, k=k, m=m, us=us["ours"], stock_us=us["stock"],
                torch_int4_us=us.get("torch_int4", ""), ratio=us["stock"] / us["ours"],
                int4_ratio=us["torch_int4"] / us["ours"] if "torch_int4" in us else "",
                gb_per_s=(n * k / 2 + 2 * n * k / GROUP + 2 * m * (n + k)) / us["ours"] / 1e3,
            )  # fmt: skip
            print(*(f"{v:.3f}" if isinstance(v, float) else v for v in table.rows[-1].values()),
                  flush=True)  # fmt: skip
    print_means(table, ("ratio", "int4_ratio"))
    print(refused, flush=True)


def tune(out: Path) -> Iterator[None]:
    """The fastest schedule of each cell, a cell at a time: the caller stops where time is up."""
    table = Table(out / "weight_only_schedules.csv", echo=False)
    for m, (shape, (n, k)) in product((1, 16, 64, 128, 32), SHAPES.items()):
        held = [draw(n, k) for _ in range(copies(n * k / 2))]
        x = torch.randn(m, k, device="cuda").bfloat16()
        tried = [c for c in SCHEDULES if c.block_m == max(m, 16)]
        us = medians_us({
            str(config): [partial(weight_only._launch, x, w, None, config) for w in held]
            for config in tried
        })  # fmt: skip
        add_ranked(table, shape, m, us, str(weight_only.product_config(m)))
        yield


if __name__ == "__main__":
    OUT = Path(sys.argv[1])
    OUT.mkdir(parents=True, exist_ok=True)
    found = find_differences(OUT)
    print("\n".join(found) or "the bits of plain weights", flush=True)
    bench(OUT)
    sys.exit(bool(found))
