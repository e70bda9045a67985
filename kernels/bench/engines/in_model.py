"""What is done in the processes that hold a model: vLLM sends it there as it is."""

from __future__ import annotations

import statistics
import time
import zlib
from typing import Any

ROWS = 1000
"""Of a product whose start is timed: more than vLLM's largest graph has."""
STEPS = (1, 8, 32, 64, 128, 256, 512)
N_REPEATS, SUMS = 3, 73
"""Sums over ranks in a step of 36 layers."""
LARGEST_E4M3 = 448


def fill(model: Any) -> None:
    """Random weights that follow each parameter's name and rank, so that every mode has the same.

    Ranks hold different ones: the sum of equal halves would be exact.
    """
    import torch
    from vllm.distributed import get_tensor_model_parallel_rank

    rank = get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(1)
            continue
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()) + rank)
        if "scale" in name:  # Of FP8 codes, which are drawn wider by as much.
            parameter.data.uniform_(1e-4, 3e-4, generator=generator)
            continue
        is_fp8 = parameter.dtype == torch.float8_e4m3fn
        values = parameter.data.to(torch.bfloat16) if is_fp8 else parameter.data
        values.normal_(0, 100 if is_fp8 else 0.02, generator=generator)
        if is_fp8:  # Not every torch has the largest code, rather than NaN, for more than that.
            parameter.data.copy_(values.clamp_(-LARGEST_E4M3, LARGEST_E4M3))


def allocation_retries() -> int:
    """How often torch has freed all that it held because the GPU's memory was full."""
    import torch

    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))


def all_reduce_us(model: Any) -> dict[int, float]:
    """By rows: what a sum over all ranks takes, among SUMS in a row as vLLM captures them."""
    import torch
    from vllm.distributed import tensor_model_parallel_all_reduce
    from vllm.distributed.parallel_state import graph_capture

    where, found = next(model.parameters()).device, {}
    for rows in STEPS:
        x = torch.randn(rows, 4096, device=where, dtype=torch.bfloat16)
        tensor_model_parallel_all_reduce(x)
        graph = torch.cuda.CUDAGraph()
        with graph_capture(where) as context, torch.cuda.graph(graph, stream=context.stream):
            for _ in range(SUMS):
                tensor_model_parallel_all_reduce(x)
        times = []
        for _ in range(N_REPEATS + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / SUMS)
        found[rows] = statistics.median(times[2:])
    return found


def host_us(model: Any) -> dict[str, float]:
    """By N x K, what starting the product takes as vLLM starts it; the GPU is not waited for."""
    import torch

    found = {}
    for layer in model.model.layers[0].modules():
        if not hasattr(layer, "quant_method") or getattr(layer, "weight", None) is None:
            continue
        x = layer.weight.new_zeros(ROWS, layer.weight.shape[1])
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(20):
                layer.quant_method.apply(layer, x)
            times.append((time.perf_counter() - started) / 20)
        found["x".join(map(str, layer.weight.shape))] = min(times) * 1e6
    return found
