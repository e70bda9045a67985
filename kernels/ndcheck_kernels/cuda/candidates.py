"""Configurations worth trying for a product; the frozen tables were chosen from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from ndcheck_kernels.cuda import configs
from ndcheck_kernels.cuda.configs import MatmulConfig

MOST_ROWS = 8192


def _tile(*sizes: int, **options: int) -> MatmulConfig:
    return MatmulConfig("tile", *sizes, **options)  # type: ignore[arg-type]


def _swap(*sizes: int, **options: int) -> MatmulConfig:
    return replace(_tile(*sizes, **options), swap=True)


def _persistent(*sizes: int, **options: bool) -> MatmulConfig:
    return MatmulConfig("persistent", *sizes, **options)  # type: ignore[arg-type]


# From which M up to which M a configuration is worth trying.
CANDIDATES = (
    (1, 16, _swap(16, 64, 256, 4, 5, prefetch=512)),
    (1, 16, _swap(16, 64, 256, 4, 5, prefetch=256)),
    (1, 16, _swap(16, 128, 128, 4, 5)),
    (1, 16, _swap(16, 64, 128, 4, 5)),
    (1, 16, _swap(16, 32, 256, 4, 4, extra_n=16)),
    (1, 16, _swap(16, 64, 256, 4, 3, extra_n=32)),
    (1, 16, _persistent(16, 64, 256, 4, 5, swap=True)),
    (1, 16, _persistent(16, 64, 256, 4, 5, swap=True, specialize=False)),
    (17, 32, _swap(32, 64, 256, 4, 4)),
    (17, 32, _swap(32, 64, 256, 4, 4, prefetch=512)),
    (17, 32, _persistent(32, 64, 256, 4, 4, swap=True)),
    (17, 64, _swap(32, 64, 128, 4, 8)),
    (33, 128, _swap(64, 64, 128, 4, 6)),
    (33, 128, _swap(64, 64, 128, 4, 6, prefetch=512)),
    (33, 128, _persistent(64, 64, 128, 4, 5, swap=True)),
    (33, 256, _tile(64, 64, 64, 4, 6)),
    (65, 256, _swap(128, 64, 128, 4, 4)),
    (65, 256, _swap(128, 64, 128, 4, 4, prefetch=512)),
    (65, 256, _persistent(128, 64, 128, 4, 4, specialize=False)),
    (65, 512, _tile(64, 128, 128, 4, 4)),
    (65, 512, _tile(64, 128, 64, 4, 4)),
    (65, 512, _tile(128, 64, 64, 4, 4)),
    (65, 512, _tile(128, 128, 64, 4, 3)),
    (129, 1024, _tile(128, 128, 64, 8, 5)),
    (129, 512, _persistent(128, 128, 64, 8, 5)),
    (129, 1024, _tile(256, 128, 64, 8, 4)),
    (129, 1024, _tile(256, 128, 64, 8, 3, extra_n=64)),
    (129, 1024, _persistent(256, 128, 64, 8, 3)),
    (1025, 8192, _persistent(128, 256, 64, 8, 3)),
    (1025, 8192, _persistent(128, 256, 64, 8, 3, specialize=False)),
    (1025, 8192, _persistent(256, 128, 64, 8, 3, specialize=False)),
)


def candidates(m: int) -> list[MatmulConfig]:
    return [config for low, high, config in CANDIDATES if low <= m <= high]


def variants(config: MatmulConfig, groups: int) -> Iterator[MatmulConfig]:
    """A configuration with its K-groups in sequence and in parallel, as far as there is such."""
    for parallel in (False, True):
        variant = replace(config, parallel=parallel)
        if variant.refusal(groups) is None:
            yield variant


def of_shape(n: int, k: int, groups: int) -> dict[MatmulConfig, tuple[int, int]]:
    """Every configuration to try for a 16-bit shape, with its first and last number of rows.

    Those of the frozen tables keep their rows there, and the one that serves every M has them all.
    """
    found = {variant: (low, high) for low, high, c in CANDIDATES for variant in variants(c, groups)}
    for config, (low, high) in configs.frozen_ranges(n, k).items():
        if config.refusal(groups) is None:
            before = found.get(config, (low, high))
            found[config] = (min(low, before[0]), min(MOST_ROWS, max(high, before[1])))
    return found | {configs.ONE_FOR_ALL: (1, MOST_ROWS)}


@cache
def known() -> dict[str, MatmulConfig]:
    """Every configuration that there is, by its label: a file can name no other."""
    tried = {v for _, _, c in CANDIDATES for groups in (1, 2) for v in variants(c, groups)}
    return {config.label: config for config in tried | configs.every_config()}
