"""Time of one launch: CUDA graph replays or loops, over operands that rotate, variants in turn."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

REPLAYS = 7
ROTATED_BYTES = {"cuda": 320e6, "cpu": 64e6}
"""What operands must add up to, so that none stays in the cache until its next turn."""
MOST_COPIES = 32

Launches = Sequence[Callable[[], object]]
"""The same work on operands that rotate."""
Scope = Callable[[], AbstractContextManager[object]]
"""Entered once around a block of launches."""


@dataclass(frozen=True, slots=True)
class _Block:
    """How long one replay lasts about, and how many launches it holds at most."""

    us: float
    launches: int


# A captured launch may keep counters for good; a loop need not end soon, but clocks drift.
_BLOCKS = {"cuda": _Block(2000, 60), "cpu": _Block(5000, 1000)}


def copies(n_bytes: float, device_type: str = "cuda") -> int:
    """How many copies of operands of this size to rotate through."""
    return max(1, min(MOST_COPIES, round(ROTATED_BYTES[device_type] / n_bytes)))


def medians_us(
    variants: Mapping[str, Launches],
    device_type: str = "cuda",
    scopes: Mapping[str, Scope] | None = None,
) -> dict[str, float]:
    """Median time of one launch of each variant; they take turns, so all see the same clocks.

    `scopes` are entered around the launches of the variant of that name.
    """
    scopes = scopes or {}
    blocks = {
        name: _block(launches, scopes.get(name, nullcontext), device_type)
        for name, launches in variants.items()
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for replay in range(REPLAYS + 1):
        for name, (run, count) in blocks.items():
            us = elapsed_us(run, device_type) / count
            if replay:  # the first one warms up
                times[name].append(us)
    return {name: statistics.median(values) for name, values in times.items()}


def _block(launches: Launches, scope: Scope, device_type: str) -> tuple[Callable[[], object], int]:
    """A block of launches, on a GPU as a graph, and how many it holds."""
    with scope():
        for launch in launches:
            launch()
        once_us = max(elapsed_us(launches[0], device_type), 2.0)
    size = _BLOCKS[device_type]
    if device_type == "cpu":  # slow enough that a turn of all copies could take seconds
        launches = launches[: max(2, round(size.us / once_us))]
    rounds = max(1, min(size.launches, round(size.us / once_us)) // len(launches))

    def run() -> None:
        with scope():
            for _ in range(rounds):
                for launch in launches:
                    launch()

    count = rounds * len(launches)
    if device_type != "cuda":
        return run, count
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay, count


def elapsed_us(work: Callable[[], object], device_type: str = "cuda") -> float:
    """Of one call, until the device has done it."""
    if device_type != "cuda":
        started_s = time.perf_counter()
        work()
        return (time.perf_counter() - started_s) * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000


def copy_gb_per_s(device_type: str = "cuda") -> float:
    """Bytes read and written per second by a copy at its best: of 2 GB, or of 128 MB on a CPU."""
    n = 1 << (30 if device_type == "cuda" else 26)
    source = torch.empty(n, dtype=torch.bfloat16, device=device_type).normal_()
    target = torch.empty_like(source)
    return 4 * n / _best_us(lambda: target.copy_(source), device_type) / 1000


def mm_tflop_per_s(device_type: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> float:
    """Of a square product at its best: of 8192, or of 2048 on a CPU."""
    n = 8192 if device_type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device_type).to(dtype) for _ in range(2))
    return 2 * n**3 / _best_us(lambda: a @ b.t(), device_type) / 1e6


def _best_us(work: Callable[[], object], device_type: str) -> float:
    """A ceiling is what the device can do, whatever else it does at times."""
    return min(elapsed_us(work, device_type) for _ in range(REPLAYS + 1))
