"""Where the host spends a prefill: ops, launches, and the functions that start them.

A prefill of few tokens takes as long as the host needs to start its kernels, whatever the GPU does.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ndcheck.records import Arm
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.sampler import TransformersSampler

WARM_UPS, REPEATS = 3, 10
MOST_ROWS = 25
_LAUNCHES = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")


def write_host_profile(
    path: Path, sampler: TransformersSampler, arm: Arm, n_rows: int, n_tokens: int
) -> str:
    """Write what a prefill costs the host, and return the first line of it."""
    rows = [[(7 * i + j) % 4096 for j in range(n_tokens)] for i in range(n_rows)]
    on_gpu = sampler._device.type == "cuda"

    def wait() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() * 1000

    started, done = [], []
    with torch.inference_mode(), sampler.arm(arm):
        batch = ExactBatch(sampler.model, sampler._device, n_rows, n_tokens + 1)
        for _ in range(WARM_UPS + REPEATS):
            batch.reset(rows)
            begin = wait()
            batch.compute_prompt("whole")
            started.append(time.perf_counter() * 1000 - begin)
            done.append(wait() - begin)
        batch.reset(rows)
        wait()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as ops:
            batch.compute_prompt("whole")
            wait()
        batch.reset(rows)
        wait()
        functions = cProfile.Profile()
        functions.runcall(batch.compute_prompt, "whole")
    averages = ops.key_averages()
    launches = Counter(
        {e.key: e.count for e in averages if any(name in e.key for name in _LAUNCHES)}
    )
    gpu_ms = sum(getattr(e, "self_device_time_total", 0) for e in averages) / 1000
    first = (
        f"{arm} prefill {n_rows} x {n_tokens}: {statistics.median(done[WARM_UPS:]):.2f} ms "
        f"({min(done[WARM_UPS:]):.2f} to {max(done[WARM_UPS:]):.2f}), of which the host "
        f"{statistics.median(started[WARM_UPS:]):.2f}; GPU busy {gpu_ms:.2f}; "
        f"{launches.total()} launches"
    )
    text = io.StringIO()
    print(first, dict(launches), "", sep="\n", file=text)
    print(averages.table(sort_by="self_cpu_time_total", row_limit=MOST_ROWS), file=text)
    if on_gpu:
        print(averages.table(sort_by="self_device_time_total", row_limit=MOST_ROWS), file=text)
    for order in ("tottime", "cumtime"):
        pstats.Stats(functions, stream=text).sort_stats(order).print_stats(MOST_ROWS)
    path.write_text(text.getvalue(), encoding="utf-8")
    return first
