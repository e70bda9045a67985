"""How many rows fit in memory: an estimate, which a CUDA device then has to confirm."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ndcheck.samplers.local.batch import ExactBatch, layer_state

MOST_ROWS = {"cpu": 32, "cuda": 512}
"""What `--loads auto` stays below: larger batches cost time before they cost memory."""
FILLED = 0.8
"""The share of the free memory that a batch may take: the estimate leaves the allocator out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left; torch has several ways to say so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(
        re.search(r"out of memory|allocate memory", str(error))
    )


def largest_batch_size(
    model: Any,
    device: torch.device,
    n_prompt: int,
    width: int,
    try_rows: Callable[[int], None],
    n_scored: int = 1,
) -> int:
    """The most rows of ``n_prompt`` tokens that fit with a cache of ``width`` columns.

    A pass gives the logits of ``n_scored`` tokens of each row.
    On CUDA ``try_rows`` runs that many: where it runs out of memory, half of them are tried.
    """
    n_rows = int(
        FILLED * free_bytes(device) / bytes_per_row(model, device, n_prompt, width, n_scored)
    )
    n_rows = max(1, min(n_rows, MOST_ROWS.get(device.type, MOST_ROWS["cpu"])))
    while device.type == "cuda" and n_rows > 1:
        try:
            try_rows(n_rows)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        n_rows = -(-n_rows // 2)
    return n_rows


def bytes_per_row(
    model: Any, device: torch.device, n_prompt: int, width: int, n_scored: int = 1
) -> int:
    """Its KV cache, its logits with what is read off them, and the widest layer of its prompt."""
    batch = ExactBatch(model, device, 1, width)
    batch.reset([[0]])
    vocabulary = batch.compute_prompt("whole").shape[-1]
    cache: int = sum(
        part.numel() * part.element_size()
        for layer in batch.cache.layers
        for part in layer_state(layer).tensors()
    )
    config = model.config.get_text_config(decoder=True)
    widest = 4 * config.hidden_size + 3 * (getattr(config, "intermediate_size", 0) or 0)
    activations: int = (n_prompt + n_scored - 1) * widest * model.dtype.itemsize
    scored: int = (n_scored - 1) * vocabulary * model.dtype.itemsize
    return cache + 16 * vocabulary + scored + activations


def free_bytes(device: torch.device) -> int:
    """Memory that a process can still have, inside its container."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + held)
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return free if limit.strip() == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free


@contextmanager
def in_float32(model: Any, device: torch.device) -> Iterator[torch.dtype]:
    """The model's 16-bit weights as fp32, and then as they were; yields what it computes in."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    narrow = [t for t in tensors if t.dtype in (torch.bfloat16, torch.float16)]
    n_bytes = sum(4 * t.numel() for t in narrow)
    is_plain = all(type(t.data) is Tensor for t in model.parameters())
    if not is_plain or n_bytes > free_bytes(device) / 2:
        yield model.dtype
        return
    kept = [t.data for t in narrow]
    try:
        for tensor in narrow:
            tensor.data = tensor.data.float()
        yield torch.promote_types(model.dtype, torch.float32)
    finally:
        for tensor, data in zip(narrow, kept, strict=True):
            tensor.data = data
