"""Which configurations of a product are in its bit class on this machine?

The class of a shape is that of the one configuration that serves every M on any chip. Each other
configuration computes rows of operands whose exact product is 0, so that nothing but rounding is
left of it: at both ends and in the middle of the numbers of rows it may be chosen for, in turned
places, beside NaN and infinity, and once with an addend. One that gives a single row another bit
is out of the class, and named.

Control: a planted configuration that cuts K once more from 17 rows on. Where that is not found out
in most of its elements, the operands tell nothing, and nothing is proven.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from ndcheck_kernels.cuda import candidates, configs, device
from ndcheck_kernels.cuda.compiler import compile_failure, quiet_compiler
from ndcheck_kernels.cuda.configs import MatmulConfig
from ndcheck_kernels.cuda.products import borrowed, matmul
from ndcheck_kernels.cuda.products.proofs import Shape
from ndcheck_kernels.measure.resources import compiling, resources

PROBES = 32
ROWS = (
    *(1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513),
    *(1023, 1024, 1025, 2048, 4095, 4096, 8192),
)
PLANTED = "planted: K cut once more from 17 rows on"
MOST_OUTPUTS = 2**29
_PLANTED_FROM = 17

DEFAULT_SHAPES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096))
"""Of an 8B: qkv, attention's output, gate and up, down, logits."""

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x [M, K], w [N, K], addend [M, N] or None -> [M, N]."""


@dataclass(frozen=True, slots=True)
class ShapeProof:
    """What was seen of one shape. `control` says what is wrong with the proof itself, or None."""

    shape: Shape
    rows: tuple[int, ...]
    classes: dict[str, str | None]
    """By label: None is in the class, a text says why not."""
    untried: dict[str, str]
    """By label: why it does not run on this chip."""
    control: str | None
    borrowed: dict[int, str | None]
    """cuBLASLt's product by number of rows."""

    @property
    def shut_out(self) -> dict[str, str]:
        return {label: why for label, why in self.classes.items() if why is not None}

    @property
    def selectable_shut_out(self) -> dict[str, str]:
        """Those of them that the frozen tables could have selected here."""
        labels = {config.label for config in configs.frozen_ranges(self.shape.n, self.shape.k)}
        return {label: why for label, why in self.shut_out.items() if label in labels}


def shape_of(n: int, k: int, dtype: torch.dtype, where: torch.device) -> Shape:
    groups = configs.k_groups(n, k, dtype.itemsize, device.capability(where))
    return Shape(n, k, str(dtype).removeprefix("torch."), groups)


def compile_ahead(shapes: Sequence[Shape], where: torch.device) -> dict[tuple[str, int], str]:
    """Compile every configuration to try, in processes; the disk cache then serves the launches.

    Returns why one does not fit this chip, by label and K-groups.
    """
    work = {_Build(configs.ONE_FOR_ALL, s.groups + 1, s.dtype, m) for s in shapes for m in (17, 32)}
    for shape in shapes:
        for config in candidates.of_shape(shape.n, shape.k, shape.groups):
            build = _Build(config, shape.groups, shape.dtype)
            work |= {build, replace(build, has_addend=True)}
            if config.kind == "pointer":  # Compiled for one row and for odd numbers too.
                work |= {replace(build, rows=1), replace(build, rows=3)}
                work.add(replace(build, rows=1, has_addend=True))
    capability = device.capability(where)
    properties: Any = torch.cuda.get_device_properties(where)
    shared = properties.shared_memory_per_block_optin
    compile_one = functools.partial(_compile, capability=capability, most_shared_bytes=shared)
    found = {}
    workers = max(1, min(16, (os.cpu_count() or 1) - 1))
    # Not forked: this process may have started CUDA.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        largest_first = sorted(work, key=lambda build: -build.size)
        for build, reason in zip(largest_first, pool.map(compile_one, largest_first), strict=True):
            if reason is not None:
                found[build.config.label, build.groups] = reason
    return found


@dataclass(frozen=True, slots=True)
class _Build:
    """What a kernel is compiled for."""

    config: MatmulConfig
    groups: int
    dtype: str
    rows: int = 4096
    has_addend: bool = False

    @property
    def size(self) -> int:
        config = self.config
        return config.block_m * (config.block_n + config.extra_n) * config.block_k


def _compile(build: _Build, *, capability: int, most_shared_bytes: int) -> str | None:
    """Without the GPU. Why a configuration cannot or should not run on a chip, or None."""
    config, dtype = build.config, getattr(torch, build.dtype)
    x, w = (torch.empty(rows, 4096, dtype=dtype) for rows in (build.rows, 4096))
    addend = torch.empty_like(x) if build.has_addend else None
    try:
        with compiling(capability) as kernels, quiet_compiler():
            matmul._launch(x, w.t(), addend, 1.0, 1.0, None, config, build.groups)
        used = resources(kernels[0])
    except Exception as error:
        return compile_failure(error) or f"{type(error).__name__}: {str(error)[:200]}"
    if used.shared_bytes > most_shared_bytes:
        return f"it takes {used.shared_bytes} bytes of shared memory, of {most_shared_bytes}"
    # The configuration that serves every M has to run, however slowly.
    if used.spilled_bytes and config != configs.ONE_FOR_ALL:
        return f"it spills {used.spilled_bytes} bytes of registers"
    return None


def runner(config: MatmulConfig, groups: int) -> Run:
    def run(x: torch.Tensor, w: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        out = x.new_full((len(x), len(w)), torch.nan)
        return matmul._launch(x, w.t(), addend, 1.0, 1.0, out, config, groups)

    return run


def planted(groups: int) -> Run:
    """The control: its K-grouping follows M."""

    def run(x: torch.Tensor, w: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        cut = groups + (len(x) >= _PLANTED_FROM)
        return runner(configs.ONE_FOR_ALL, cut)(x, w, addend)

    return run


def rows_of(shape: Shape, row_counts: Sequence[int] = ROWS) -> tuple[int, ...]:
    """The numbers of rows that fit beside a shape's weights."""
    return tuple(m for m in row_counts if m * shape.n <= MOST_OUTPUTS)


def prove(
    shape: Shape, where: torch.device, untried: Mapping[tuple[str, int], str],
    row_counts: Sequence[int] = ROWS,
) -> ShapeProof:  # fmt: skip
    """Run every configuration of a shape, and cuBLASLt, on one device."""
    dtype = getattr(torch, shape.dtype)
    counts = rows_of(shape, row_counts)
    x, w = borrowed.cancelling(PROBES, shape.n, shape.k, dtype, where)
    poison = [torch.full_like(x[:1], value) for value in (torch.nan, torch.inf)]
    pool = torch.cat([x, *poison])
    steps = torch.arange(PROBES, device=where).to(dtype)[:, None] * 2.0**-12
    addend = steps.expand(-1, shape.n).contiguous()  # [PROBES, N]
    first = runner(configs.ONE_FOR_ALL, shape.groups)
    alone = torch.cat([first(row, w, None) for row in x.split(1)])  # [PROBES, N]
    added = torch.cat([first(x[i : i + 1], w, addend[i : i + 1]) for i in range(PROBES)])

    def deviation(run: Run, rows: Sequence[int]) -> str | None:
        for m in rows:
            for company, index in _batches(m, where):
                if not _is_like(run(pool[index], w, None), alone, index):
                    return f"other bits at {m} rows{company}"
        m = min(PROBES, max(rows))
        if not torch.equal(run(x[:m], w, addend[:m]), added[:m]):
            return f"other bits at {m} rows with an addend"
        return None

    classes: dict[str, str | None] = {}
    skipped: dict[str, Any] = {}
    for config, (low, high) in candidates.of_shape(shape.n, shape.k, shape.groups).items():
        if (reason := untried.get((config.label, shape.groups))) is not None:
            skipped[config.label] = reason
            continue
        inside = [m for m in counts if low <= m <= high]
        if not inside:
            continue
        try:
            classes[config.label] = deviation(runner(config, shape.groups), inside)
        except Exception as error:
            skipped[config.label] = reason = compile_failure(error)
            if reason is None:
                raise
    return ShapeProof(
        shape, counts, classes, skipped, _control(deviation, planted(shape.groups), counts),
        dict(_borrowed(shape, where, counts)),
    )  # fmt: skip


def _control(
    deviation: Callable[[Run, Sequence[int]], str | None], fault: Run, counts: Sequence[int]
) -> str | None:
    """What is wrong with a proof, or None: its planted fault was found, and only where it is."""
    before = [m for m in counts if m < _PLANTED_FROM]
    after = [m for m in counts if m >= _PLANTED_FROM]
    if not after:
        return f"no number of rows from {_PLANTED_FROM} on was tried, so nothing could be planted"
    if before and (reason := deviation(fault, before)) is not None:
        return f"the configuration that serves every M is no class: {reason}"
    if deviation(fault, after) is None:
        return "the planted configuration was not found out: these operands tell nothing"
    return None


def _borrowed(
    shape: Shape, where: torch.device, counts: Sequence[int]
) -> Iterator[tuple[int, str | None]]:
    if where.type != "cuda" or torch.version.cuda is None:
        return
    ours = runner(configs.ONE_FOR_ALL, shape.groups)
    for m in counts:
        yield m, borrowed.prove(shape, m, where, ours)


def _batches(m: int, where: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Batches of m rows, as indices into the pool, and what is special about each."""
    turn = torch.arange(m, device=where)
    yield "", turn % PROBES
    if m > 1:
        yield ", in another place", (turn + 7) % PROBES
        # The last two rows of the pool.
        poisoned = torch.where(turn % 4 == 1, PROBES + turn // 4 % 2, (turn + 3) % PROBES)
        yield ", beside NaN and infinity", poisoned


def _is_like(got: torch.Tensor, alone: torch.Tensor, index: torch.Tensor) -> bool:
    """Whether every row but the poisoned has the bits that it has alone."""
    probe = index < PROBES
    equal = (got == alone[index.clamp(max=PROBES - 1)]).all(-1)
    return bool((equal | ~probe).all())
