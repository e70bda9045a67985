"""The GPU kernels that a call launches."""

from __future__ import annotations

import torch

from ndcheck.explain.recording import Call


def kernel_names(call: Call) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the kernels launched (alone, loaded), in order; empty where no GPU takes part."""
    if not torch.cuda.is_available():
        return (), ()
    alone, loaded = (_launched(call, args, kwargs) for args, kwargs in (call.alone, call.loaded))
    return alone, loaded


def _launched(call: Call, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[str, ...]:
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode():
        call.func(*args, **kwargs)  # The first call may load kernels.
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call.func(*args, **kwargs)
            torch.cuda.synchronize()
    events = [e for e in profiler.events() if str(e.device_type).endswith("CUDA")]
    return tuple(event.name for event in events if not event.name.startswith("Mem"))
