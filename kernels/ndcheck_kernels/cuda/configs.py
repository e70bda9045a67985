"""Frozen launch tables: what may follow the batch, and what may not.

The K-grouping fixes the bits of a product, so `k_groups` never sees M. Everything in a
`MatmulConfig` is schedule only: on the architectures in `PROVEN` the GPU tests show that all
configurations with the same grouping give the same bits, so the tables may follow M there.
Everywhere else one configuration serves every M.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ndcheck_kernels.cuda.borrowed_ranges import OTHERS, RANGES

PROVEN = frozenset({90})
"""Compute capabilities on which the bit-class proof has run (tests/kernels/gpu)."""


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """Schedule of one product x @ w.T: x is [M, K] (tokens), w is [N, K] (weights)."""

    kind: Literal["pointer", "tile", "persistent"]
    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 4
    extra_n: int = 0
    """Columns of a second accumulator: tiles of 96, 160 or 192 columns fill the chip better."""
    swap: bool = False
    """Weights as the first operand: few tokens lie on the narrow side of the instruction."""
    parallel: bool = False
    """One program per K-group (else one program walks them in sequence)."""

    specialize: bool = True
    """Persistent kernels: loads and products in separate warps."""
    prefetch: int = 0
    """Columns of the first weights that L2 is asked for before earlier kernels have finished."""

    def refusal(self, groups: int) -> str | None:
        """Why this configuration cannot run a product of `groups` K-groups, or None."""
        if self.kind != "tile" and (self.extra_n or self.parallel):
            return "only tile kernels take extra_n or parallel"
        if self.kind == "persistent" and groups > 1:
            return "the persistent kernel has one K-group"
        if self.parallel and self.extra_n:
            return "parallel groups take no second accumulator"
        if self.parallel and groups == 1:
            return "one K-group has nothing to run in parallel"
        return None

    @property
    def label(self) -> str:
        """Its name in files and tables; no two configurations share one."""
        flags = [f for f in ("swap", "parallel", "specialize") if getattr(self, f)]
        sizes = (self.block_m, self.block_n, self.block_k, self.warps, self.stages)
        extra = (f"x{self.extra_n}", f"p{self.prefetch}")
        return "/".join(map(str, (self.kind, *flags, *sizes, *extra)))


ONE_FOR_ALL = MatmulConfig("pointer", 64, 64, 32, warps=4, stages=3)
_POINTER = (
    (16, MatmulConfig("pointer", 16, 64, 128, warps=4, stages=3)),
    (64, MatmulConfig("pointer", 64, 64, 64, warps=4, stages=4)),
    (1 << 62, MatmulConfig("pointer", 128, 128, 64, warps=8, stages=3)),
)


def _tile(*sizes: int, **options: int) -> MatmulConfig:
    return MatmulConfig("tile", *sizes, **options)  # type: ignore[arg-type]


def _swap(*sizes: int, **options: int) -> MatmulConfig:
    return replace(_tile(*sizes, **options), swap=True)


_ANY = 1 << 62
_Table = tuple[tuple[int, MatmulConfig], ...]  # up to which M a configuration serves

_FEW = _swap(16, 64, 256, 4, 5, prefetch=512)
_MANY = MatmulConfig("persistent", 128, 256, 64, 8, 3)

_DEFAULT: _Table = (
    (16, _FEW),
    (32, _swap(32, 64, 256, 4, 4)),
    (64, _swap(64, 64, 128, 4, 6)),
    (128, _swap(128, 64, 128, 4, 4)),
    (256, _tile(128, 128, 64, 8, 5)),
    (512, _tile(256, 128, 64, 8, 4)),
    (_ANY, _MANY),
)

_NARROW: _Table = (
    (16, _swap(16, 64, 256, 4, 5, parallel=True)),
    (32, _swap(32, 64, 128, 4, 8, parallel=True)),
    (64, _tile(64, 64, 128, 4, 6, parallel=True)),
    (128, _swap(64, 64, 128, 4, 6, parallel=True, prefetch=1024)),
    (256, _tile(64, 128, 128, 4, 4, parallel=True)),
    (512, _tile(64, 128, 128, 4, 4)),
    (1024, _tile(64, 128, 64, 4, 6, extra_n=32)),
    (_ANY, _tile(128, 128, 64, 8, 5, extra_n=32)),
)

_N4096: _Table = (
    (16, _FEW),
    (32, _swap(32, 64, 128, 4, 8)),
    (64, _tile(64, 32, 256, 4, 4)),
    (128, _swap(64, 64, 128, 4, 6, prefetch=1024)),
    (256, _tile(64, 128, 128, 4, 4)),
    (512, _tile(128, 128, 64, 8, 5)),
    (_ANY, _MANY),
)

# Where another choice than the default was faster on an H200, by (N, K).
_MEASURED: dict[tuple[int, int], _Table] = {
    (4096, 4096): _N4096,
    (4096, 12288): _N4096,
    (5120, 2048): ((16, _swap(16, 64, 128, 4, 5, prefetch=512)), *_DEFAULT[1:]),
    (6144, 4096): (
        (8, _FEW),
        (16, _swap(16, 32, 256, 2, 4)),
        (32, _swap(32, 64, 128, 4, 4)),
        (64, _swap(64, 64, 128, 4, 6)),
        (128, _swap(128, 64, 128, 4, 4)),
        (256, _tile(128, 128, 64, 8, 5)),
        (512, _tile(128, 128, 64, 8, 5, extra_n=64)),
        (1024, _tile(128, 128, 64, 8, 5)),
        (_ANY, _MANY),
    ),
    (24576, 4096): (
        (16, _FEW),
        (32, _swap(32, 64, 256, 4, 4)),
        (64, _swap(64, 128, 64, 4, 6, extra_n=64)),
        (128, _swap(128, 64, 128, 4, 4)),
        (256, _tile(128, 128, 64, 8, 5)),
        (512, _tile(256, 128, 64, 8, 4)),
        (_ANY, _MANY),
    ),
    (151936, 4096): (
        (16, _swap(16, 128, 128, 4, 5)),
        (32, _swap(32, 128, 128, 4, 5)),
        (64, _swap(64, 128, 64, 4, 6, extra_n=64)),
        (128, _tile(128, 128, 128, 8, 3)),
        (1024, _tile(256, 128, 64, 8, 4)),
        (_ANY, _MANY),
    ),
}


def _table(n: int, k: int) -> _Table:
    return _NARROW if _narrow(n, k) else _MEASURED.get((n, k), _DEFAULT)


def _narrow(n: int, k: int) -> bool:
    """Too few weight rows to fill the chip with whole-K tiles, and a K long enough to cut."""
    return n <= 2048 and k >= 4096


def _fixed(itemsize: int, capability: int) -> bool:
    """One configuration for every M: no proof, or no tensor cores (fp32)."""
    return itemsize != 2 or capability not in PROVEN


def k_groups(n: int, k: int, itemsize: int, capability: int) -> int:
    """S, the number of K-chunks: the only choice here that changes bits."""
    return 2 if _narrow(n, k) and not _fixed(itemsize, capability) else 1


def chunk_length(k: int, groups: int) -> int:
    """Length of a K-chunk: a multiple of every BLOCK_K, so that no block spans two chunks."""
    return -(-k // (256 * groups)) * 256


def pointer_config(m: int, itemsize: int, capability: int) -> MatmulConfig:
    """For operands that TMA cannot read."""
    if _fixed(itemsize, capability):
        return ONE_FOR_ALL
    return next(config for max_m, config in _POINTER if m <= max_m)


def matmul_config(m: int, n: int, k: int, itemsize: int, capability: int) -> MatmulConfig:
    if _fixed(itemsize, capability):
        return ONE_FOR_ALL
    return next(config for max_m, config in _table(n, k) if m <= max_m)


def borrows(m: int, n: int, k: int, itemsize: int, capability: int) -> bool:
    """Whether cuBLASLt is faster than `matmul_config`'s choice; the same bits, once proven."""
    spans = RANGES.get((n, k), () if _narrow(n, k) else OTHERS)
    return not _fixed(itemsize, capability) and any(first <= m <= last for first, last in spans)


def frozen_ranges(n: int, k: int) -> dict[MatmulConfig, tuple[int, int]]:
    """What the frozen tables of a proven chip choose for a 16-bit shape, from which M to which."""
    found: dict[MatmulConfig, tuple[int, int]] = {}
    for table in (_table(n, k), _POINTER):
        low = 1
        for high, config in table:
            found[config] = (min(low, found.get(config, (low, high))[0]), high)
            low = high + 1
    return found


def every_config() -> set[MatmulConfig]:
    """Every configuration in any frozen table of products."""
    tables = (_DEFAULT, _NARROW, _N4096, *_MEASURED.values(), _POINTER)
    return {ONE_FOR_ALL} | {config for table in tables for _, config in table}


def has_own_table(n: int, k: int) -> bool:
    """Whether a shape's schedules were tuned by themselves."""
    return _table(n, k) is not _DEFAULT


def selectable_configs(n: int, k: int, itemsize: int, capability: int) -> set[MatmulConfig]:
    """Every configuration that some M or some alignment can select: what a proof must cover."""
    if _fixed(itemsize, capability):
        return {ONE_FOR_ALL}
    return {config for _, config in (*_table(n, k), *_POINTER)}


# Up to which mean number of rows in a group. A swapped tile has room for hardly fewer than a group
# may have, which then reads its weights once, and a multiprocessor for two. What is read ahead may
# be of a group without rows: not where there are many such.
_GROUPED: _Table = (
    (1, _swap(16, 64, 256, 4, 2)),
    (3, _swap(16, 64, 128, 4, 4)),
    (10, _swap(16, 128, 64, 4, 5)),
    (24, _swap(32, 64, 128, 4, 4)),
    (64, _swap(64, 64, 128, 4, 6)),
    (_ANY, _tile(128, 128, 64, 8, 4)),
)


def grouped_config(rows: int, groups: int, itemsize: int, capability: int) -> MatmulConfig:
    """Schedule of a product of rows in groups with weights of their own, each [N, K]."""
    if _fixed(itemsize, capability):
        return ONE_FOR_ALL
    return next(config for mean, config in _GROUPED if rows <= mean * groups)


# The same for gates and up at once: a program has `block_n` columns of both.
_GATES: _Table = (
    (3, _swap(16, 64, 64, 4, 5)),
    (10, _swap(16, 64, 128, 4, 5)),
    (24, _swap(32, 64, 64, 4, 5)),
    (64, _swap(64, 64, 64, 4, 4, prefetch=512)),
)


def gate_config(rows: int, groups: int, itemsize: int, capability: int) -> MatmulConfig | None:
    """As `grouped_config`, of gates and up in one launch; None where they take one by one."""
    if _fixed(itemsize, capability):
        return None
    return next((config for mean, config in _GATES if rows <= mean * groups), None)


def grouped_pointer_config(rows: int, groups: int, itemsize: int, capability: int) -> MatmulConfig:
    """For operands that TMA cannot read."""
    return pointer_config(-(-rows // groups), itemsize, capability)


def selectable_grouped_configs(itemsize: int, capability: int) -> set[MatmulConfig]:
    """Every configuration that some number of rows or some alignment can select."""
    if _fixed(itemsize, capability):
        return {ONE_FOR_ALL}
    return {config for _, config in (*_GROUPED, *_POINTER)}


def selectable_gate_configs(itemsize: int, capability: int) -> set[MatmulConfig]:
    """Every configuration of gates and up in one launch that some number of rows can select."""
    return set() if _fixed(itemsize, capability) else {config for _, config in _GATES}


@dataclass(frozen=True, slots=True)
class RowTile:
    """Whole rows in one program; chosen by the row's length alone."""

    rows: int
    block: int
    warps: int


def row_tile(n: int) -> RowTile:
    block = max(16, 1 << (n - 1).bit_length())
    if block > 65536:
        raise ValueError(f"rows of {n} elements are longer than 65536, the most one tile holds")
    return RowTile(rows=max(1, 2048 // block), block=block, warps=min(16, max(4, block // 1024)))


@dataclass(frozen=True, slots=True)
class PrefillTile:
    block_q: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class DecodeTile:
    warps: int
    stages: int
    per_sm: int = 1 << 30
    """As long as so many programs per multiprocessor remain, one takes several splits; twice as
    many remain where splits are long."""
    by_hand: bool = False
    """By `decode_hopper` where that can read the operands."""


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """`split`, `block_kv` and `short_splits` fix the bits; the rest is schedule."""

    split: int
    block_kv: int
    short: PrefillTile
    long: PrefillTile
    few: DecodeTile
    many: DecodeTile
    """Where there are more splits in all than multiprocessors."""
    max_rows: int
    """Up to this many queries per key head, splits run in parallel."""

    short_splits: int = 16
    """After so many splits they are four times as long: a long context has enough of them."""

    def prefill(self, q_length: int) -> PrefillTile:
        return self.short if q_length < 4096 else self.long

    def decode(self, rows: int, splits: int, pairs: int, sms: int) -> tuple[DecodeTile, int]:
        """The tile for `rows` of queries over `splits` of each of `pairs` of sequences and key
        heads, and how many a program takes in order.
        """
        tile = self.many if splits * pairs > sms else self.few
        if rows > 16:  # Four warps lack registers for them, and three stages shared memory.
            tile = replace(tile, warps=8, stages=2)
        per_sm = tile.per_sm * (2 if splits > self.short_splits else 1)
        programs = max(1, -(-per_sm * sms // pairs))
        return tile, -(-splits // min(splits, programs))

    def splits(self, tokens: int) -> int:
        long = tokens - self.short_splits * self.split
        if long <= 0:
            return -(-tokens // self.split)
        return self.short_splits - (-long // (4 * self.split))


def attention_config(head_dim: int, itemsize: int, capability: int) -> AttentionConfig:
    """For heads whose keys or values, whichever are wider, have `head_dim` columns."""
    if itemsize == 4 or head_dim > 128 or capability not in PROVEN:
        small, few = PrefillTile(32, 4, 1), DecodeTile(4, 1)
        return AttentionConfig(256, 32, small, small, few, few, max_rows=16)
    return AttentionConfig(
        256, 128, PrefillTile(64, 8, 2), PrefillTile(128, 8, 2), DecodeTile(4, 3),
        DecodeTile(4, 2, 8, by_hand=True), max_rows=64,
    )  # fmt: skip
