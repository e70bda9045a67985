"""Device time of launches: CUDA graph replays over operands that do not fit in the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

REPLAYS = 7
GRAPH_US = 2000.0

Launches = Sequence[Callable[[], object]]
"""The same work on operands that rotate."""


def medians_us(variants: Mapping[str, Launches]) -> dict[str, float]:
    """Median time of one launch of each variant; they take turns, so all see the same clocks."""
    graphs = {name: _capture(launches) for name, launches in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for replay in range(REPLAYS + 1):
        for name, (graph, count) in graphs.items():
            us = elapsed_us(graph.replay) / count
            if replay:  # the first one warms up
                times[name].append(us)
    return {name: statistics.median(values) for name, values in times.items()}


def _capture(launches: Launches) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of about GRAPH_US, and how many launches it holds."""
    for launch in launches:
        launch()
    once_us = max(elapsed_us(launches[0]), 2.0)
    rounds = max(1, min(60, round(GRAPH_US / once_us)) // len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for launch in launches:
                launch()
    return graph, rounds * len(launches)


def elapsed_us(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000


def copy_gb_per_s() -> float:
    """Bytes read and written per second by a device-to-device copy of 2 GB."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    us = statistics.median(elapsed_us(lambda: target.copy_(source)) for _ in range(REPLAYS))
    return 4 * source.numel() / us / 1000


def mm_tflop_per_s() -> float:
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / medians_us({"mm": [lambda: a @ b]})["mm"] / 1e6
