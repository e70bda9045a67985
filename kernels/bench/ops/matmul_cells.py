"""The shapes and batch sizes of the GEMM comparison, and the configurations tried for each."""

from __future__ import annotations

from ndcheck_kernels.cuda.configs import MatmulConfig

SHAPES = {
    "qkv 8B": (6144, 4096),
    "o 8B": (4096, 4096),
    "gate_up 8B": (24576, 4096),
    "down 8B": (4096, 12288),
    "lm_head 8B": (151936, 4096),
    "qkv 70B TP8": (1280, 8192),
    "o 70B TP8": (8192, 1024),
    "gate_up 70B TP8": (7168, 8192),
    "down 70B TP8": (8192, 3584),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def tile(*sizes: int, **options: int) -> MatmulConfig:
    return MatmulConfig("tile", *sizes, **options)


def swap(*sizes: int, **options: int) -> MatmulConfig:
    return MatmulConfig("tile", *sizes, swap=True, **options)


def persistent(*sizes: int, **options: bool) -> MatmulConfig:
    return MatmulConfig("persistent", *sizes, **options)


# From which M up to which M a configuration is worth trying.
CANDIDATES = (
    (1, 16, swap(16, 64, 256, 4, 5, prefetch=512)),
    (1, 16, swap(16, 64, 256, 4, 5, prefetch=256)),
    (1, 16, swap(16, 128, 128, 4, 5)),
    (1, 16, swap(16, 64, 128, 4, 5)),
    (1, 16, swap(16, 32, 256, 4, 4, extra_n=16)),
    (1, 16, swap(16, 64, 256, 4, 3, extra_n=32)),
    (1, 16, persistent(16, 64, 256, 4, 5, swap=True)),
    (1, 16, persistent(16, 64, 256, 4, 5, swap=True, specialize=False)),
    (17, 32, swap(32, 64, 256, 4, 4)),
    (17, 32, swap(32, 64, 256, 4, 4, prefetch=512)),
    (17, 32, persistent(32, 64, 256, 4, 4, swap=True)),
    (17, 64, swap(32, 64, 128, 4, 8)),
    (33, 128, swap(64, 64, 128, 4, 6)),
    (33, 128, swap(64, 64, 128, 4, 6, prefetch=512)),
    (33, 128, persistent(64, 64, 128, 4, 5, swap=True)),
    (33, 256, tile(64, 64, 64, 4, 6)),
    (65, 256, swap(128, 64, 128, 4, 4)),
    (65, 256, swap(128, 64, 128, 4, 4, prefetch=512)),
    (65, 256, persistent(128, 64, 128, 4, 4, specialize=False)),
    (65, 512, tile(64, 128, 128, 4, 4)),
    (65, 512, tile(64, 128, 64, 4, 4)),
    (65, 512, tile(128, 64, 64, 4, 4)),
    (65, 512, tile(128, 128, 64, 4, 3)),
    (129, 1024, tile(128, 128, 64, 8, 5)),
    (129, 512, persistent(128, 128, 64, 8, 5)),
    (129, 1024, tile(256, 128, 64, 8, 4)),
    (129, 1024, tile(256, 128, 64, 8, 3, extra_n=64)),
    (129, 1024, persistent(256, 128, 64, 8, 3)),
    (1025, 8192, persistent(128, 256, 64, 8, 3)),
    (1025, 8192, persistent(128, 256, 64, 8, 3, specialize=False)),
    (1025, 8192, persistent(256, 128, 64, 8, 3, specialize=False)),
)


def candidates(m: int) -> list[MatmulConfig]:
    return [config for low, high, config in CANDIDATES if low <= m <= high]


def label(config: MatmulConfig) -> str:
    flags = [config.kind] + [f for f in ("swap", "parallel", "specialize") if getattr(config, f)]
    sizes = (config.block_m, config.block_n, config.block_k, config.warps, config.stages)
    return "/".join(map(str, (*flags, *sizes, f"x{config.extra_n}", f"p{config.prefetch}")))
