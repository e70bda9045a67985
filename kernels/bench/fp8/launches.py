"""Every launch of FP8 weights' kernels, for `bench.ops.every_launch`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch

from bench.fp8.products import BY_HAND
from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.products.fp8 import fp8_configs, fp8_matmul
from ndcheck_kernels.cuda.rows import quantise

Launch = tuple[str, Callable[[], object]]
Extent = Literal["kinds", "figures", "all"]


def fp8(capability: int, dtype: torch.dtype, extent: Extent) -> Iterator[Launch]:
    if capability < fp8_matmul.FIRST_CAPABILITY:
        return
    x = torch.empty(600, 2048, dtype=dtype)
    kinds = {"blocks": None, "one": quantise.OneScale(), "given": quantise.OneScale(torch.empty(1))}
    for (kind, one), rows in itertools.product(kinds.items(), (x, x[:8])):
        for name, call, operands in (
            ("quantise_rows", quantise.quantise_rows, (rows,)),
            ("quantise_rows at places", quantise.quantise_rows, (rows, torch.arange(5))),
            ("silu_mul_quantise", quantise.silu_mul_quantise, (rows, rows)),
            ("rms_norm_quantise", quantise.rms_norm_quantise, (rows, x[0], 1e-6)),
        ):
            yield f"{name}, {kind}", partial(call, *operands, one_scale=one)
    q = torch.empty(2, 32, 1, 128, dtype=dtype)
    for columns in (200, 2000):
        cache, limits = q.new_empty(2, 8, columns, 128), torch.empty(2, dtype=torch.int32)
        yield (
            f"quantised_attention over {columns}",
            lambda cache=cache, limits=limits: causal.quantised_attention(
                q, cache, cache, starts=limits, lengths=limits, scale=1.0
            ),
        )
    k = 12288  # Of many K-groups.
    codes = torch.empty(600, k, dtype=torch.float8_e4m3fn)
    row_scales, one_scale = torch.empty(96, 600).t(), torch.empty(600)
    weight = torch.empty(16, 1536, k, dtype=torch.float8_e4m3fn)
    scales, ends = torch.empty(16, 12, 96), torch.empty(16, dtype=torch.int32)
    selectable = tuple(
        dict.fromkeys(
            (
                *fp8_configs.selectable_configs(capability),
                *fp8_configs.selectable_configs(capability, by_block=False),
            )
        )
    )
    if extent == "kinds":
        by_size = sorted(selectable, key=lambda c: (c.block_m * c.block_n, c.stages))
        selectable = tuple({(c.swap, c.parallel): c for c in by_size}.values())
    by_hand = BY_HAND if device.has_hopper_kernels(codes.device) else ()
    if extent == "kinds":  # The largest by rows of a warpgroup, and by its K-groups.
        by_hand = tuple({c.block_m: c for c in by_hand}.values())
    addend = torch.empty(600, 1536, dtype=dtype)
    addends = (addend,) if extent == "kinds" else (None, addend)
    for config in by_hand:
        for c in addends:
            yield (
                f"block_fp8 {config}",
                lambda c=c, config=config: fp8_matmul._launch(
                    codes, row_scales, weight[0], scales[0], c, dtype, config
                ),
            )
    for config in selectable:
        for c in addends:
            yield (
                f"block_fp8 {config}",
                lambda c=c, config=config: fp8_matmul._launch(
                    codes, row_scales, weight[0], scales[0], c, dtype, config
                ),
            )
            yield (
                f"row_fp8 {config}",
                lambda c=c, config=config: fp8_matmul._launch(
                    codes, one_scale, weight[0], one_scale[:1], c, dtype, config
                ),
            )
        yield (
            f"grouped block_fp8 {config}",
            lambda config=config: fp8_matmul._launch_grouped(
                codes, row_scales, weight, scales, ends, dtype, config
            ),
        )
        yield (
            f"grouped row_fp8 {config}",
            lambda config=config: fp8_matmul._launch_grouped(
                codes, one_scale, weight, one_scale[:16, None], ends, dtype, config
            ),
        )
