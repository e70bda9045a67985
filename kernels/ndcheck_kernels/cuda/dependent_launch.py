"""Programmatic dependent launch: a kernel's start overlaps the end of the one before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ndcheck_kernels.cuda import device


@triton.jit
def follow(PDL: tl.constexpr):
    """Let the next kernel start, and wait until what earlier kernels wrote can be read."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def pdl(where: torch.device) -> dict[str, bool]:
    """Launch options; every kernel launched with them must call `follow` or wait itself."""
    if device.on_gpu(where) and device.capability(where) >= 90:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
