"""Whether a row of vLLM's FlashAttention has the same bits in whatever step it is computed.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.engines.attention_bits OUT_DIR

A request of 1,500 tokens, its last 1, 5, 40 or 200 of them as queries over a paged cache, alone and
beside requests whose longest query has 1 to 300 tokens: its last row against that of the whole
prompt, prefilled alone, all of them in one split. Once with the step's own longest query, once
with what `ndcheck_kernels.engines.layers.attention_step` makes of it. Head dimensions of 64 to 256,
three and one query heads to a key head, windows that only longer requests fill, pages of 16 and 128
tokens. Writes attention_bits.csv; ten seconds. Exit code 1 where bits of what the plug-in covers
differ by it, 3 where none differ without it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

from bench.table import Table
from ndcheck_kernels.engines.layers import has_kernels_by_window, longest_query

HEAD_DIMS, HEADS_A_KEY_HEAD, PAGES = (64, 80, 96, 128, 192, 256), (3, 1), (16, 128)
LENGTH, QUERIES, LONGEST = 1500, (1, 5, 40, 200), (0, 1, 2, 9, 10, 21, 22, 64, 65, 129, 193, 300)
"""Tokens of the request, its queries, and the longest query beside it; none with 0."""
STEPS = [
    [own] if longest == 0 else [own, min(longest, 60), 1, longest]
    for own, longest in itertools.product(QUERIES, LONGEST)
]
"""Queries of each request."""
NEIGHBOURS, WINDOW = (60, 700, 2500), 2048
"""Tokens of the others; with the last the window counts, which the request alone does not fill."""


class Case:
    """Paged keys and values of random requests, the one that is looked at first."""

    def __init__(self, head_dim: int, ratio: int, page: int, window: int | None) -> None:
        self.window = window
        lengths = (LENGTH, *NEIGHBOURS)
        pages = [-(-length // page) for length in lengths]
        draw = torch.Generator("cuda").manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            drawn = torch.randn(*shape, generator=draw, device="cuda")
            return drawn.to(torch.bfloat16)

        self.keys, self.values = (random(sum(pages), page, 3, head_dim) for _ in range(2))
        self.queries = [random(length, 3 * ratio, head_dim) for length in lengths]
        self.table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device="cuda")
        starts = itertools.accumulate(pages, initial=0)
        for row, (start, n) in enumerate(zip(starts, pages, strict=False)):
            self.table[row, :n] = torch.arange(start, start + n)

    def last_row(self, asked: list[int], longest: int) -> torch.Tensor:
        """Of the first request, where each has its last ``asked`` tokens as queries."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        queries = [q[len(q) - n :] for q, n in zip(self.queries, asked, strict=False)]
        lengths = [len(q) for q in self.queries[: len(asked)]]
        ends = torch.tensor([0, *itertools.accumulate(asked)], dtype=torch.int32, device="cuda")
        out: Any = flash_attn_varlen_func(
            q=torch.cat(queries), k=self.keys, v=self.values,
            cu_seqlens_q=ends, max_seqlen_q=longest,
            seqused_k=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
            max_seqlen_k=max(lengths),
            causal=True, window_size=None if self.window is None else [self.window - 1, 0],
            block_table=self.table[: len(asked)], fa_version=3, num_splits=1,
        )  # fmt: skip
        return out[asked[0] - 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    table = Table(out / "attention_bits.csv")
    worst, control = 0, 0
    cases = itertools.product(HEAD_DIMS, HEADS_A_KEY_HEAD, PAGES, (None, WINDOW))
    for head_dim, ratio, page, window in cases:
        case = Case(head_dim, ratio, page, window)
        is_covered = window is None or not has_kernels_by_window(head_dim)
        whole = case.last_row([LENGTH], LENGTH)
        vllms = ours = 0
        for asked in STEPS:
            told = longest_query(head_dim, max(asked))
            vllms += not torch.equal(case.last_row(asked, max(asked)), whole)
            ours += not torch.equal(case.last_row(asked, told), whole)
        control += vllms
        worst += ours if is_covered else 0
        table.add(
            head_dim=head_dim, heads_a_key_head=ratio, page=page, window=window or "",
            covered=is_covered, steps=len(STEPS), differ_vllm=vllms, differ_ndcheck=ours,
        )  # fmt: skip
    print(f"differ in covered layers: {worst}; without the plug-in, in all: {control}")
    return 1 if worst else 0 if control else 3


if __name__ == "__main__":
    sys.exit(main())
