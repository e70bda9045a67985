"""Times schedules of the products of a Qwen3-30B-A3B layer, beside what the frozen tables choose.

    PYTHONPATH=kernels python -m bench.tuning.experts OUT_DIR [TOKENS,...]

First each product by itself, then a whole mixture with the fastest of them and what they prefetch.
A schedule with other bits than the pointer kernels' is printed as WRONG and left out. All compile
at once, on every core. Half a minute for 256, 1 and 64 tokens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from bench.table import Table, add_ranked
from ndcheck_kernels.cuda import configs, routing
from ndcheck_kernels.cuda.configs import MatmulConfig
from ndcheck_kernels.cuda.products import grouped_matmul, matmul
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul
from ndcheck_kernels.measure.resources import SHARED_LIMIT, compiling, resources
from ndcheck_kernels.measure.timing import copies, medians_us
from ndcheck_kernels.models.mixture import mixture

EXPERTS, HIDDEN, INNER, TOP_K = 128, 2048, 768, 8
INPUTS = 8
ANCHOR = MatmulConfig("pointer", 64, 64, 64, warps=4, stages=4)
LINEAR = {"qkv": (5120, 2048), "output": (2048, 4096), "router": (128, 2048)}
"""(N, K) of the layer's other products, tuned for one token: of more cuBLASLt's are borrowed."""
PREFETCHES = ((512, 512), (1024, 512), (512, 256))
"""Columns of gates and of down."""

# block_n, block_k, warps, stages, of every block_m that is tried.
SIZES = {
    "gate": (
        *((64, 64, 4, 5), (64, 128, 4, 5), (32, 128, 4, 4), (64, 64, 4, 10), (32, 64, 4, 8)),
        *((128, 64, 8, 5), (32, 256, 4, 2), (32, 128, 2, 5)),
    ),
    "down": (
        *((128, 64, 4, 5), (64, 128, 4, 4), (64, 64, 4, 8), (64, 256, 4, 2), (64, 256, 4, 3)),
        *((32, 256, 4, 3), (32, 128, 2, 5), (64, 256, 4, 5)),
    ),
    "linear": (
        *((32, 256, 2, 4), (32, 256, 4, 4), (16, 256, 2, 4), (64, 128, 4, 5), (64, 256, 4, 5)),
    ),
}
ROWS = {1: (16,), 64: (16,), 256: (32,)}
"""block_m by the number of tokens."""


def candidates(kind: str, tokens: int) -> list[MatmulConfig]:
    return [
        MatmulConfig("tile", m, *size, swap=True)
        for m in ROWS.get(tokens, (16, 32, 64))
        for size in SIZES[kind]
    ]


def linear_candidates(n: int, k: int) -> list[MatmulConfig]:
    parallel = configs.k_groups(n, k, 2, 90) > 1
    tried = [replace(c, prefetch=512, parallel=parallel) for c in candidates("linear", 1)]
    return [configs.matmul_config(1, n, k, 2, 90), *tried]


def shipped(kind: str, tokens: int) -> MatmulConfig:
    config: MatmulConfig = CHOOSERS[kind](tokens * TOP_K, EXPERTS, 2, 90)
    return config


CHOOSERS: Mapping[str, Callable[..., Any]] = {
    "gate": configs.gate_config,
    "down": configs.grouped_config,
}


def product(
    kind: str, config: MatmulConfig, x: torch.Tensor, w: torch.Tensor, source: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Of x [T, K] by gates and up, or of x [P, K] by down."""
    if kind == "down":
        return grouped_matmul._launch(x, w.mT, ends, None, config, 1)
    if config.kind == "tile":
        return grouped_matmul._launch(x, w.mT, ends, None, config, 1, source)
    both = grouped_matmul._launch(x[source], w.mT, ends, None, config, 1)
    return silu_mul(*both.chunk(2, -1))


def linear(config: MatmulConfig, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return matmul._launch(x, w.t(), None, 1.0, 1.0, None, config, configs.k_groups(*w.shape, 2, 90))


def fits(kind: str, config: MatmulConfig | None, tokens: int) -> bool:
    """Compile without the GPU; the disk cache then serves the timing run."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    pairs = tokens * TOP_K
    index, ends = torch.zeros(pairs, dtype=torch.int64), torch.empty(EXPERTS, dtype=torch.int32)
    with compiling(90) as kernels:
        if config is None:  # What a mixture launches beside its products.
            routing.choose_routes(empty(tokens, EXPERTS), TOP_K, True)
            place = index.view(tokens, TOP_K)
            grouped_matmul.combine(
                empty(pairs, HIDDEN), place, empty(tokens, TOP_K), empty(tokens, HIDDEN)
            )
        elif kind == "gate":
            w = empty(EXPERTS, 2 * INNER, HIDDEN)
            product(kind, config, empty(tokens, HIDDEN), w, index, ends)
        elif kind == "down":
            w = empty(EXPERTS, HIDDEN, INNER)
            product(kind, config, empty(pairs, INNER), w, index, ends)
        else:
            n, k = LINEAR[kind]
            linear(config, empty(tokens, k), empty(n, k))
        used = [resources(kernel) for kernel in kernels]
    return all(u.spilled_bytes == 0 and u.shared_bytes <= SHARED_LIMIT[90] for u in used)


def cancelling(rows: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and weights whose exact products are zero: what is left are roundings, made large."""
    order = torch.randperm(k, device="cuda")
    x, w = (torch.randn(m, k // 2, device="cuda").bfloat16() for m in (rows, n))
    x, w = torch.cat([x, x], 1)[:, order] * 64, torch.cat([w, -w], 1)[:, order] * 256
    return x.contiguous(), w.contiguous()


def ranked(
    table: Table, name: str, tokens: int, runs: Mapping[MatmulConfig, Callable[..., torch.Tensor]],
    inputs: list[tuple[torch.Tensor, ...]], chosen: MatmulConfig, right: torch.Tensor,
) -> list[MatmulConfig]:  # fmt: skip
    """The schedules that give what is right for the first of the inputs, the fastest first."""
    same = {}
    for config, run in runs.items():
        if torch.equal(run(*inputs[0]), right):
            same[config] = run
        else:
            print("WRONG", name, tokens, config.label, flush=True)
    times = medians_us({c.label: [partial(run, *i) for i in inputs] for c, run in same.items()})
    add_ranked(table, name, tokens, times, chosen.label)
    return sorted(same, key=lambda c: times[c.label])


def time_mixture(
    table: Table, tokens: int, block: Any, pool: ProcessPoolExecutor,
    gate: list[MatmulConfig], down: list[MatmulConfig],
) -> None:  # fmt: skip
    """A router and its experts as a layer runs them, with what the products prefetch."""
    inputs = [
        torch.randn(2, tokens, HIDDEN, device="cuda").bfloat16().unbind() for _ in range(INPUTS)
    ]
    pairs = [(gate[0], down[0]), (gate[1], down[0]), (gate[0], down[1])]
    # Which experts few rows chose is known ahead for down alone.
    most = max(PREFETCHES)[0] if tokens * TOP_K > EXPERTS else 0
    pairs += [
        (replace(gate[0], prefetch=min(g, most)), replace(down[0], prefetch=d))
        for g, d in PREFETCHES
    ]
    ahead = {(kind, both[i], tokens) for both in pairs for i, kind in enumerate(CHOOSERS)}
    list(pool.map(fits, *zip(*ahead, strict=True)))
    runs = {" ".join(c.label for c in both): both for both in pairs}
    runs["shipped"] = shipped("gate", tokens), shipped("down", tokens)
    launches, right = {}, mixture(inputs[0][0], block, inputs[0][1])
    for name, (g, d) in runs.items():

        def run(x: torch.Tensor, residual: torch.Tensor, g: Any = g, d: Any = d) -> torch.Tensor:
            with (
                patch.object(grouped_matmul, "gate_config", lambda *_: g),
                patch.object(grouped_matmul, "grouped_config", lambda *_: d),
            ):
                return mixture(x, block, residual)

        if torch.equal(run(*inputs[0]), right):
            launches[name] = [partial(run, *i) for i in inputs]
        else:
            print("WRONG mixture", tokens, name, flush=True)
    add_ranked(table, "mixture", tokens, medians_us(launches), "shipped")


@torch.inference_mode()
def tune(out: Path, counts: list[int]) -> None:
    wanted: dict[tuple[str, int], list[MatmulConfig]] = {}
    for tokens in counts:
        for kind in CHOOSERS:
            wanted[kind, tokens] = [shipped(kind, tokens), *candidates(kind, tokens)]
        if tokens == 1:
            wanted |= {(name, 1): linear_candidates(*shape) for name, shape in LINEAR.items()}
    jobs: list[tuple[str, MatmulConfig | None, int]] = [
        (kind, c, tokens) for (kind, tokens), tried in wanted.items() for c in tried
    ]
    jobs += [(kind, ANCHOR, counts[0]) for kind in CHOOSERS]
    jobs += [("mixture", None, tokens) for tokens in counts]
    # Forked before CUDA is first used.
    pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), get_context("fork"))
    fitting = dict(zip(jobs, pool.map(fits, *zip(*jobs, strict=True)), strict=True))
    print(f"{sum(fitting.values())} of {len(jobs)} fit", flush=True)
    table = Table(out / "tune_experts.csv", echo=False)
    x_gate, gates = cancelling(max(counts) * INPUTS, EXPERTS * 2 * INNER, HIDDEN)
    x_down, downs = cancelling(max(counts) * TOP_K, EXPERTS * HIDDEN, INNER)
    weights = {
        "gate": gates.view(EXPERTS, 2 * INNER, HIDDEN),
        "down": downs.view(EXPERTS, HIDDEN, INNER),
    }
    router = torch.randn(EXPERTS, HIDDEN, device="cuda").bfloat16()
    block = SimpleNamespace(
        gate=SimpleNamespace(weight=router, top_k=TOP_K, norm_topk_prob=True),
        experts=SimpleNamespace(
            gate_up_proj=weights["gate"], down_proj=weights["down"], num_experts=EXPERTS
        ),
    )
    for tokens in counts:
        inputs: dict[str, list[tuple[torch.Tensor, ...]]] = {"gate": [], "down": []}
        for x in x_gate.split(tokens)[:INPUTS]:
            logits = torch.randn(tokens, EXPERTS, device="cuda").bfloat16()
            source, _, _, _, ends = routing.choose_routes(logits, TOP_K, True)
            inputs["gate"].append((x, weights["gate"], source, ends))
            rows = x_down[: tokens * TOP_K]
            inputs["down"].append((rows, weights["down"], source, ends))
        best = {}
        for kind in CHOOSERS:
            fitted = [c for c in wanted[kind, tokens] if fitting[kind, c, tokens]]
            runs = {c: partial(product, kind, c) for c in fitted}
            right = product(kind, ANCHOR, *inputs[kind][0])
            best[kind] = ranked(
                table, kind, tokens, runs, inputs[kind], shipped(kind, tokens), right
            )
        time_mixture(table, tokens, block, pool, best["gate"], best["down"])
        if tokens == 1:
            for name, shape in LINEAR.items():
                x, w = cancelling(1, *shape)
                n_copies = copies(2 * w.numel())
                operands = [(x, w.clone()) for _ in range(n_copies)]
                fitted = [c for c in wanted[name, 1] if fitting[name, c, 1]]
                runs = {c: partial(linear, c) for c in fitted}
                ranked(table, name, 1, runs, operands, fitted[0], linear(ANCHOR, x, w))
    pool.shutdown()


if __name__ == "__main__":
    tokens_of = sys.argv[2] if len(sys.argv) > 2 else "256,1,64"
    tune(Path(sys.argv[1]), [int(n) for n in tokens_of.split(",")])
