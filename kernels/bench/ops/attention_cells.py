"""Attention problems: 32 query heads over 8 key heads of 128, bf16."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ndcheck_kernels.measure.timing import copies

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DECODE = tuple(
    (batch, context)
    for batch in (1, 4, 16, 64, 256)
    for context in (128, 1024, 4096, 32768)
    if batch * context <= 64 * 32768  # 256 x 32k would need 34 GB of keys and values
)
PREFILL = ((1, 2048), (4, 2048), (1, 8192), (1, 32768), (16, 1024), (1, 512), (1, 128))


def operands(
    batch: int, queries: int, context: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Enough copies that keys and values do not stay in the cache."""
    size = 4 * batch * KV_HEADS * context * HEAD_DIM

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    return [
        (draw(HEADS, queries), draw(KV_HEADS, context), draw(KV_HEADS, context))
        for _ in range(copies(size))
    ]


def problems() -> Iterator[tuple[str, int, int, int]]:
    """kind, batch, queries, context."""
    for batch, context in PREFILL:
        yield "prefill", batch, context, context
    for batch, context in DECODE:
        yield "decode", batch, 1, context
