"""Products with 4-bit weights: the bits of plain ones, and times beside bf16 and torch's own.

    PYTHONPATH=kernels python -m bench.weight_only.products OUT_DIR

`stock` is torch's product with the plain bf16 weight, `torch_int4` is torch._weight_int4pack_mm, of
the same groups.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.fp8.products import SHAPES, runs
from bench.parts import compile_each
from bench.table import Table, add_ranked, print_means
from ndcheck_kernels.cuda.products import weight_only
from ndcheck_kernels.cuda.products.matmul import matmul
from ndcheck_kernels.cuda.products.weight_only import (
    Config,
    FewRowsConfig,
    WeightOnlyConfig,
    weight_only_matmul,
)
from ndcheck_kernels.measure.resources import compiling
from ndcheck_kernels.measure.timing import copies, medians_us
from ndcheck_kernels.ops.weight_only import Packed, dequantise, pack

GROUP = 128
FEW = (1, 8, 16)
BATCHES = (*FEW, 32, 64, 128, 256, 1024, 4096)
Choice = Config | None
TILES = {
    (16, 64, 128, 4): (8, 12), (16, 64, 256, 4): (4, 6, 8, 12), (16, 64, 512, 4): (3, 6),
    (16, 128, 256, 8): (4,), (32, 64, 128, 4): (8,), (32, 64, 256, 4): (3, 4, 6),
    (32, 128, 256, 8): (3, 4), (64, 64, 128, 4): (3, 5, 8), (64, 64, 256, 4): (3, 4),
    (64, 128, 128, 8): (3, 5), (128, 64, 128, 4): (3, 4, 5), (128, 128, 128, 8): (3, 4, 5),
    (256, 128, 64, 8): (3, 4, 6), (256, 128, 128, 8): (2, 3),
}  # fmt: skip
BY_WARPS = {
    (16, 8, 256, 4): (3, 4, 6, 8, 12), (16, 8, 256, 8): (4, 6), (16, 8, 512, 4): (3, 4, 6),
    (16, 16, 128, 4): (8,), (16, 16, 256, 2): (4, 8), (16, 16, 256, 4): (3, 4, 6, 8),
    (32, 8, 256, 4): (3, 4), (32, 16, 256, 4): (3, 4), (32, 16, 256, 8): (3,),
}  # fmt: skip
SCHEDULES: list[Config] = [
    *(WeightOnlyConfig(*sizes, stages) for sizes, depths in TILES.items() for stages in depths),
    *(FewRowsConfig(*sizes, stages) for sizes, depths in BY_WARPS.items() for stages in depths),
]
UNPACKED = "unpacked first"


def is_tried(config: Config, m: int) -> bool:
    """Tiles of half the rows, or of no more than a tile of that kind has to have."""
    least = min(max(16, 1 << (m - 1).bit_length()), 256)
    return config.block_m == least or (32 < least == 2 * config.block_m)


def compile_all(configs: Sequence[Config]) -> None:
    compile_each(_compile, *zip(*product(configs, (False, True)), strict=True))


def _compile(config: Config, has_addend: bool) -> None:
    x = torch.empty(600, 4096, dtype=torch.bfloat16)
    codes, scales = torch.empty(4096, 2048, dtype=torch.uint8), x[:32].clone()
    packed = Packed(codes, scales, None, None, 4, 4096)
    for rows in (x, x[:8]):
        with compiling(90):
            weight_only._launch(rows, packed, rows if has_addend else None, config)


def usable(configs: Sequence[Config]) -> list[Config]:
    """Those whose kind runs in another process, which a kernel that hangs or faults ends."""
    found: list[Config] = []
    for kind in (WeightOnlyConfig, FewRowsConfig):
        own = [config for config in configs if isinstance(config, kind)]
        process = multiprocessing.get_context("spawn").Process(target=_launch_each, args=(own,))
        process.start()
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode == 0:
            found += own
        else:
            print(f"{kind.__name__} is left out: exit code {process.exitcode}", flush=True)
    return found


def _launch_each(configs: Sequence[Config]) -> None:
    packed, x = draw(6144, 4096), torch.randn(17, 4096, device="cuda").bfloat16()
    for config in configs:
        weight_only._launch(x, packed, None, config)
        torch.cuda.synchronize()


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


def find_differences(out: Path, tried: Sequence[Config] = ()) -> list[str]:
    """Configurations that give other bits than `matmul` with the plain weight; and a control.

    Those ``tried`` beside what is shipped multiply weights of the form that tables are made for.
    """
    table, differing = Table(out / "weight_only_bits.csv", echo=False), []
    shapes = (
        *((6144, 4096, 128, 4), (2304, 12288, 128, 4), (1024, 12288, 32, 4)),
        *((1000, 512, 512, 8), (384, 4096, 64, 8)),
    )
    for n, k, group, bits in shapes:
        rows, packed = cancelling(n, k, group, bits)
        plain = weight_only.unpacked(packed, torch.bfloat16)
        if not torch.equal(plain, dequantise(packed, torch.bfloat16)):
            differing.append(f"{n}x{k} of {bits} bits: the weight as unpacked")
        expected = matmul(rows, plain.t())
        varied = draw(n, k, group, bits)  # Whose scales differ from group to group.
        expected_of_varied = matmul(rows, weight_only.unpacked(varied, torch.bfloat16).t())
        configs = list(weight_only.selectable_configs(bits, group))
        if n > 2048:  # K in one group, as in the products that are tuned.
            configs += [config for config in tried if config not in configs]
        for config, m in product(configs, (1, 16, 17, 64, 128, 600)):
            got = weight_only._launch(rows[:m], packed, None, config)
            got_of_varied = weight_only._launch(rows[:m], varied, None, config)
            same = torch.equal(got, expected[:m])
            same &= torch.equal(got_of_varied, expected_of_varied[:m])
            table.add(n=n, k=k, group=group, bits=bits, m=m, config=str(config), equal=same)
            if not same:
                differing.append(f"{n}x{k} of {bits} bits, {m} rows: {config}")
        order = torch.randperm(k, device="cuda")
        shuffled = matmul(rows[:, order].contiguous(), plain[:, order].contiguous().t())
        if torch.equal(shuffled, expected):
            differing.append(f"{n}x{k}: the control, K in another order, has the same bits")
        differing += [
            f"{n}x{k} of {bits} bits, {m} rows: as shipped"
            for m in (1, 128, 129, 600)
            if not torch.equal(weight_only_matmul(rows[:m], packed), expected[:m])
        ]
    return differing


def torch_int4(n: int, k: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Operands of torch's own product, with the group: another layout, the same bytes."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scales = torch.rand(k // GROUP, n, 2, device="cuda").bfloat16()
    return torch._convert_weight_to_int4pack(codes, 8), GROUP, scales


def bench(out: Path, batches: tuple[int, ...] = BATCHES) -> None:
    """Few rows of every shape first, and the means of what there is after each number of rows."""
    table, refused = Table(out / "weight_only.csv", echo=False), ""
    for m in batches:
        for shape, (n, k) in SHAPES.items():
            refused = _compare(table, shape, n, k, m) or refused
        print_means(table, ("ratio", "int4_ratio"))
    print(refused, flush=True)


def _compare(table: Table, shape: str, n: int, k: int, m: int) -> str:
    """Add a row of times; says what torch refused."""
    held = [draw(n, k) for _ in range(copies(n * k / 2))]
    plain = [weight_only.unpacked(w, torch.bfloat16) for w in held[: copies(2 * n * k)]]
    x = torch.randn(m, k, device="cuda").bfloat16()
    variants = {
        "ours": [partial(weight_only_matmul, x, w) for w in held],
        "stock": [partial(F.linear, x, w) for w in plain],
    }
    if not (refused := runs(lambda: torch._weight_int4pack_mm(x, *torch_int4(n, k)))):
        theirs = [torch_int4(n, k) for _ in held]
        variants["torch_int4"] = [partial(torch._weight_int4pack_mm, x, *each) for each in theirs]
    us = medians_us(variants)
    table.add(
        shape=shape, n=n, k=k, m=m, us=us["ours"], stock_us=us["stock"],
        torch_int4_us=us.get("torch_int4", ""), ratio=us["stock"] / us["ours"],
        int4_ratio=us["torch_int4"] / us["ours"] if "torch_int4" in us else "",
        gb_per_s=(n * k / 2 + 2 * n * k / GROUP + 2 * m * (n + k)) / us["ours"] / 1e3,
    )  # fmt: skip
    print(*(f"{v:.3f}" if isinstance(v, float) else v for v in table.rows[-1].values()),
          flush=True)  # fmt: skip
    return refused


def tune(out: Path, configs: Sequence[Config], until: float) -> None:
    """The fastest schedule of each cell, and from now on what products choose.

    Up to 16 rows share one, the best on the whole; cells that no time was left for keep theirs.
    """
    table = Table(out / "weight_only_schedules.csv", echo=False)
    chosen: dict[tuple[int, int], dict[int, Choice]] = {}
    for m, (shape, (n, k)) in product((*FEW, 32, 64, 128, 256, 512, 1024), SHAPES.items()):
        if time.monotonic() > until:
            break
        held = [draw(n, k) for _ in range(copies(n * k / 2))]
        x = torch.randn(m, k, device="cuda").bfloat16()
        variants = {
            str(config): [partial(weight_only._launch, x, w, None, config) for w in held]
            for config in configs
            if is_tried(config, m)
        }
        if m > 64:
            variants[UNPACKED] = [partial(unpack_and_multiply, x, w) for w in held]
        us = medians_us(variants)
        add_ranked(table, shape, m, us, str(weight_only.product_config(x, held[0])))
        if m in FEW[:-1]:
            continue
        cells = [m] if m > FEW[-1] else list(FEW)
        rows = [row for row in table.rows if row["shape"] == shape and row["m"] in cells]
        totals: dict[str, float] = {}
        for row in rows:
            config = str(row["config"])
            totals[config] = totals.get(config, 0) + math.log(float(str(row["us"])))
        best = min(totals, key=totals.__getitem__)
        chosen.setdefault((n, k), {})[m] = next((c for c in configs if str(c) == best), None)
    adopt(out, chosen)


def adopt(out: Path, chosen: Mapping[tuple[int, int], Mapping[int, Choice]]) -> None:
    """Write what a frozen table of these choices says, and use it.

    It ends where a weight is to be unpacked first.
    """
    table = Table(out / "weight_only_choice.csv")
    for (n, k), by_rows in chosen.items():
        fused: list[tuple[int, Config]] = []
        for m, config in by_rows.items():
            if config is None:
                break
            fused.append((m, config))
            table.add(n=n, k=k, most_rows=m, config=str(config))
        weight_only._MEASURED[n, k] = tuple(fused)


def unpack_and_multiply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    return matmul(x, weight_only.unpacked(packed, x.dtype).t())


if __name__ == "__main__":
    OUT = Path(sys.argv[1])
    OUT.mkdir(parents=True, exist_ok=True)
    found = find_differences(OUT)
    print("\n".join(found) or "the bits of plain weights", flush=True)
    bench(OUT)
    sys.exit(bool(found))
