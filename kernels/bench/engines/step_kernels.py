"""What each CUDA kernel takes of a decode step, by torch's profiler, graphs included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

N_MORE = 16
"""Decode steps that are told apart from the prompt's by their number."""


def kernel_us(load: Callable[[int], object]) -> dict[str, float]:
    """Microseconds a step, most first, of ``load(n)``, which generates n tokens in this process."""
    load(1 + N_MORE)
    more, fewer = _device_us(load, 1 + N_MORE), _device_us(load, 1)
    return {name: (us - fewer[name]) / N_MORE for name, us in more.most_common()}


def _device_us(load: Callable[[int], object], n_tokens: int) -> Counter[str]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        load(n_tokens)
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        found[event.key] += event.self_device_time_total
    return found
