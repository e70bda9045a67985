"""What the fused layers of a decoder launch, compiled without the GPU.

Another process then finds the kernels in Triton's disk cache. Which ones are compiled changes no
bits: a launch that was not foreseen is compiled where it is met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.attention.qkv import qkv
from ndcheck_kernels.cuda.products import matmul
from ndcheck_kernels.cuda.rows import reductions
from ndcheck_kernels.cuda.rows.composed_norm import Weighting, composed_norm
from ndcheck_kernels.cuda.rows.logits import read_logits
from ndcheck_kernels.cuda.rows.rms_norm import rms_norm
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul
from ndcheck_kernels.measure.resources import compiling

Launch = Callable[[], object]
MOST_ROWS = 1 << 13
"""Of a product: no table chooses anything else for more."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a model with the layers that `models.decoder` fuses, of plain weights."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: str
    has_qkv_bias: bool
    has_qk_norm: bool


def launches(
    decoder: Decoder, batch_sizes: Sequence[int], lengths: Sequence[int], columns: Sequence[int]
) -> Iterator[Launch]:
    """Those of passes of ``lengths`` tokens a row over caches of so many ``columns``.

    Those that take a compiler longest come first. Many are of one kernel. Their tensors are
    allocated and never touched.
    """
    d, dtype = decoder, getattr(torch, decoder.dtype)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    for length, batch, n_columns in product(sorted(lengths, reverse=True), batch_sizes, columns):
        # As the product before and the cache lay them out.
        q = empty(batch, length, d.heads, d.head_dim).transpose(1, 2)
        k = empty(batch, d.kv_heads, n_columns, d.head_dim)
        bounds = torch.empty(batch, dtype=torch.int32)
        yield partial(causal.attention, q, k, k, starts=bounds, lengths=bounds, scale=1.0)
    yield partial(read_logits, empty(2, d.vocabulary))
    row_counts = {min(b * n, MOST_ROWS) for b in batch_sizes for n in lengths}
    yield from _products(decoder, sorted(row_counts), empty)
    norm, row = empty(d.hidden), empty(1, d.hidden)
    gate_up = empty(2, 2 * d.intermediate)
    yield partial(rms_norm, row, norm, 1e-6)
    yield partial(silu_mul, row, row)
    yield partial(silu_mul, *gate_up.chunk(2, -1))
    angles, keys = empty(1, 1, d.head_dim), empty(1, d.kv_heads, 1, d.head_dim)
    weight = empty(d.head_dim) if d.has_qk_norm else None
    x = empty(1, 1, (d.heads + 2 * d.kv_heads) * d.head_dim)
    yield partial(
        qkv, x, angles, angles, keys, keys, torch.empty((), dtype=torch.int64),
        q_weight=weight, k_weight=weight,
    )  # fmt: skip
    for width in (d.hidden, *([d.head_dim] if d.has_qk_norm else [])):
        # `models.rows.norms` tries a norm's weightings against its own ops: here the first fits.
        rows, squares = empty(2, 32, width), torch.empty(2, 32, width)
        yield partial(reductions.mean, squares, [-1], True)
        yield partial(composed_norm, rows, empty(width), 1e-6, Weighting.ROUNDED)
    for batch, length in product((1, 2), lengths):
        # The angles of rotary embeddings are products in transformers up to 5.17 at least.
        frequencies = torch.empty(1, d.head_dim // 2, 1).expand(batch, -1, -1)
        yield partial(matmul.matmul, frequencies, torch.empty(batch, 1, length))


def _products(
    decoder: Decoder, row_counts: Sequence[int], empty: Callable[..., torch.Tensor]
) -> Iterator[Launch]:
    d = decoder
    attended, joined = d.heads * d.head_dim, (d.heads + 2 * d.kv_heads) * d.head_dim
    weights = {  # Outputs and inputs, and what is added to the product.
        (joined, d.hidden): "bias" if d.has_qkv_bias else "",
        (d.hidden, attended): "residual",
        (2 * d.intermediate, d.hidden): "",
        (d.hidden, d.intermediate): "residual",
        (d.vocabulary, d.hidden): "",
    }
    for (n, k), added in weights.items():
        w = empty(n, k)
        for m in row_counts:
            addend = {"": None, "bias": empty(n), "residual": empty(m, n)}[added]
            yield partial(matmul.matmul, empty(m, k), w.t(), addend)


def compile_share(
    found: Iterable[Launch], share: int, n_shares: int, capability: int, sm_count: int
) -> list[str]:
    """Compile one of ``n_shares`` of the kernels, for a GPU of this kind, and load none.

    Every share has the same launches, in the same order. Returns the names of its kernels. A launch
    that fails is left to whoever needs it.
    """
    numbers: dict[object, int] = {}
    mine = []

    def compile_mine(self: JITFunction, key: object, *rest: Any) -> Any:
        number = numbers.setdefault((self.__module__, self.__name__, key), len(numbers))
        if number % n_shares != share:
            return None
        mine.append(self.__name__)
        return own(self, key, *rest)

    own = JITFunction._do_compile
    with (
        compiling(capability, sm_count),
        patch.object(JITFunction, "_do_compile", compile_mine),
    ):
        for launch in found:
            with suppress(Exception):
                launch()
    return mine
