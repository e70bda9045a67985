"""Schedules of FP8 products: none changes bits, so all may follow the number of rows.

Frozen from times on an H200 (results/fp8/block_fp8_schedules.csv, by `bench.fp8.measure`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ndcheck_kernels.cuda.configs import PROVEN
from ndcheck_kernels.ops.block_fp8 import GROUP


@dataclass(frozen=True, slots=True)
class Fp8Config:
    """Schedule of one product; a step of K is a block of scales."""

    block_m: int
    block_n: int
    """At most 128, and a divisor of it: a tile has one column of the weights' blocks."""
    warps: int
    stages: int
    swap: bool = False
    """As in `MatmulConfig`: one operand has at least 64 rows, so that all tiles use wgmma."""
    parallel: bool = False
    """One program per K-group (else one program walks them in sequence)."""
    hopper: bool = False
    """By `block_fp8_hopper`, where device and Triton have it and weights have blocks of scales: of
    128 rows each warpgroup takes 64, of 64 every other K-group. Elsewhere it changes nothing."""


_ONE_FOR_ALL = Fp8Config(64, 64, 4, 4)
_Table = tuple[tuple[int, Fp8Config], ...]  # up to which M a configuration serves
_ANY = 1 << 62

DEFAULT: _Table = (
    (16, Fp8Config(16, 64, 4, 6, swap=True)),
    (32, Fp8Config(32, 64, 4, 6, swap=True)),
    (64, Fp8Config(64, 64, 4, 4, swap=True)),
    (_ANY, Fp8Config(64, 128, 4, 4)),
)
_FEWEST_TILES = 264
"""Fewer leave multiprocessors without a second tile: K-groups run in parallel."""

MEASURED_BY_OUTPUT: dict[tuple[int, int], _Table] = {
    (6144, 4096): (
        (4, Fp8Config(16, 64, 4, 6, swap=True, parallel=True)),
        (16, Fp8Config(16, 64, 4, 6, swap=True)),
        (32, Fp8Config(32, 64, 4, 6, swap=True, parallel=True)),
        (64, Fp8Config(64, 64, 4, 4, swap=True, parallel=True)),
        (128, Fp8Config(64, 128, 4, 6)),
        (_ANY, Fp8Config(64, 128, 4, 3)),
    ),
    (4096, 4096): (
        (16, Fp8Config(16, 128, 4, 5, swap=True, parallel=True)),
        (32, Fp8Config(32, 64, 4, 4, swap=True, parallel=True)),
        (64, Fp8Config(64, 64, 4, 6, swap=True, parallel=True)),
        (128, Fp8Config(64, 128, 4, 6)),
        (256, Fp8Config(64, 128, 4, 4)),
        (_ANY, Fp8Config(64, 128, 4, 3)),
    ),
    (24576, 4096): (
        (16, Fp8Config(16, 64, 4, 6, swap=True)),
        (32, Fp8Config(32, 64, 4, 6, swap=True)),
        (64, Fp8Config(64, 64, 4, 4, swap=True)),
        (128, Fp8Config(64, 128, 4, 4)),
        (_ANY, Fp8Config(64, 128, 4, 3)),
    ),
    (4096, 12288): (
        (4, Fp8Config(16, 128, 4, 3, swap=True, parallel=True)),
        (16, Fp8Config(16, 64, 4, 4, swap=True, parallel=True)),
        (32, Fp8Config(32, 64, 4, 4, swap=True, parallel=True)),
        (64, Fp8Config(64, 64, 4, 4, swap=True, parallel=True)),
        (128, Fp8Config(64, 128, 4, 8)),
        (256, Fp8Config(64, 128, 4, 4)),
        (_ANY, Fp8Config(64, 128, 4, 3)),
    ),
}
"""The fastest by (N, K), of the shapes of a dense 8B; of scales by output or tensor."""

_HOPPER: dict[tuple[int, int], dict[int, Fp8Config]] = {
    (6144, 4096): {64: Fp8Config(64, 64, 4, 12, hopper=True)},
    (4096, 4096): {
        64: Fp8Config(64, 32, 4, 16, hopper=True),
        128: Fp8Config(64, 64, 4, 12, hopper=True),
        256: Fp8Config(64, 128, 4, 8, hopper=True),
    },
    (4096, 12288): {
        64: Fp8Config(64, 32, 4, 16, hopper=True),
        128: Fp8Config(64, 64, 4, 12, hopper=True),
        256: Fp8Config(64, 128, 4, 8, hopper=True),
    },
}
MEASURED: dict[tuple[int, int], _Table] = {
    shape: tuple((most, _HOPPER.get(shape, {}).get(most, config)) for most, config in table)
    for shape, table in MEASURED_BY_OUTPUT.items()
}
"""Of weights in blocks: the same, but where the kernel scheduled by hand for Hopper is faster."""


def k_groups(k: int) -> int:
    return -(-k // GROUP)


def product_config(m: int, n: int, k: int, capability: int, *, by_block: bool = True) -> Fp8Config:
    """Of weights in blocks of scales, or else with a scale a tensor or an output."""
    if capability not in PROVEN:
        return _ONE_FOR_ALL
    measured = MEASURED if by_block else MEASURED_BY_OUTPUT
    if (n, k) in measured:
        return _choose(measured[n, k], m)
    return _fill(_choose(DEFAULT, m), -(-m // _choose(DEFAULT, m).block_m), n)


def grouped_config(rows: int, groups: int, n: int, capability: int) -> Fp8Config:
    """Of rows in so many groups with weights of their own, each [N, K]: by their mean number."""
    if capability not in PROVEN:
        return _ONE_FOR_ALL
    return _fill(_choose(DEFAULT, -(-rows // groups)), min(rows, groups), n)


def _choose(table: _Table, m: int) -> Fp8Config:
    return next(config for most, config in table if m <= most)


def _fill(config: Fp8Config, tiles_m: int, n: int) -> Fp8Config:
    return replace(config, parallel=tiles_m * -(-n // config.block_n) < _FEWEST_TILES)


def selectable_configs(capability: int, *, by_block: bool = True) -> tuple[Fp8Config, ...]:
    """Every configuration that some shape can select: what a proof must cover."""
    if capability not in PROVEN:
        return (_ONE_FOR_ALL,)
    either = (
        replace(config, parallel=parallel) for _, config in DEFAULT for parallel in (False, True)
    )
    tables = (MEASURED if by_block else MEASURED_BY_OUTPUT).values()
    measured = (config for table in tables for _, config in table)
    return tuple(dict.fromkeys((*either, *measured)))


__all__ = [
    "DEFAULT",
    "MEASURED",
    "MEASURED_BY_OUTPUT",
    "Fp8Config",
    "grouped_config",
    "k_groups",
    "product_config",
    "selectable_configs",
]
