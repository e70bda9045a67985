"""What `bench.engines.plugin` runs: the engines of each stage, and what each of them measures."""

from __future__ import annotations

from dataclasses import dataclass

MODES = {
    "stock": ("0", "0"),
    "vllm": ("1", "0"),
    "ndcheck": ("1", "1"),
    # What must change nothing, and what must not start.
    "unset": ("1", ""),
    "uninstalled": ("1", "1"),
    "unknown-version": ("1", "1"),
    "stock-asked": ("0", "1"),
    "uncovered-layer": ("1", "1"),
    "dead-override": ("1", "1"),
}
"""VLLM_BATCH_INVARIANT and NDCHECK_VLLM."""
FAULTS = ("unknown-version", "uncovered-layer", "dead-override")
"""Modes in which something is planted in vLLM first."""
REFUSED = ("uncovered-layer", "dead-override")

GRAPHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Up to vLLM's own largest."""
LARGER_GRAPHS = (*GRAPHS, *range(576, 1025, 64))
FEW_GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DEEP_GEMM_ROWS = (*FEW_GRAPHS, 320, 640, 1280, 2560, 5120, 8192)
"""Of the steps of a stage that has FEW_GRAPHS."""

PROMPT = (
    "Tell me about Richard Feynman: what he worked on, whom he taught, and how he explained "
    "physics to people who had never studied any of it."
)
"""Longer than a block of the prefix cache, so that prompts are read from it too."""
LONG_PROMPT = "\n".join(
    [*(f"Letter {n}: {PROMPT}" for n in range(1, 41)), "Answer these letters in one long story."]
)
"""Of some 1,500 tokens: over fewer keys attention is in one split at any batch size in stock too,
and a small model's products are whole, so that nothing would differ."""
RUNS = {
    "run": (
        *("--model", "smollm2", "--chat", "--loads", "1,2,4,8,16,32,64,128"),
        *("-n", "800", "--max-tokens", "64", "--prompt", LONG_PROMPT),
        *("--engine-arg", "kv_cache_memory_bytes=8000000000"),
    ),
    "run8b": (
        *("--model", "kernels/bench/shapes/qwen3-8b", "--random-weights", "0"),
        *("--loads", "1,8,32,64,128", "-n", "500", "--max-tokens", "100", "--prompt", PROMPT),
        *("--engine-arg", "kv_cache_memory_bytes=7000000000"),
    ),
}
"""`ndcheck run` along all axes, as a user would."""


@dataclass(frozen=True)
class Stage:
    """Engines (model, mode) that start together, and who measures what, in order."""

    engines: tuple[tuple[str, str], ...]
    measures: tuple[tuple[str, str, tuple[str, ...]], ...]
    graphs: tuple[int, ...] = GRAPHS
    """Rows of the steps that are captured; none: nothing is compiled either."""
    n_ranks: int = 1
    is_timed: bool = True
    deep_gemm_rows: tuple[int, ...] = ()
    """At which DeepGEMM's products are compiled while the engines start."""

    def graphs_of(self, mode: str) -> tuple[int, ...]:
        """The plug-in captures larger steps than vLLM does; of fewer numbers here, for the start's
        sake."""
        return LARGER_GRAPHS if mode == "ndcheck" and self.graphs == GRAPHS else self.graphs


BOTH, OURS, VLLM = ("stock", "ndcheck"), ("ndcheck",), ("vllm",)
ALL = ("stock", "vllm", "ndcheck")
DENSE, FP8, EXPERTS, SMOLLM2, FOUR_LAYERS = (
    "qwen3-8b", "qwen3-8b-fp8", "qwen3-30b-a3b", "smollm2", "qwen3-1.4b",
)  # fmt: skip
UNCHANGED = ("vllm", "unset", "uninstalled", "unknown-version", "ndcheck", "stock", "stock-asked")


def _of(
    model: str, modes: tuple[str, ...], *measures: tuple[str, tuple[str, ...]], **options: object
) -> Stage:
    engines = tuple((model, mode) for mode in modes)
    named = tuple((model, measure, by) for measure, by in measures)
    return Stage(engines, named, **options)  # type: ignore[arg-type]


STAGES = {
    "8b": _of(
        DENSE, ALL,
        ("coverage", OURS), ("step", BOTH), ("requests", BOTH), ("prefill", BOTH),
        ("closed", BOTH), ("long", BOTH), ("step", BOTH), ("needle", BOTH), ("copies", BOTH),
        ("requests", ALL), ("kernels", BOTH), ("step", VLLM), ("copies", VLLM), ("prefill", VLLM),
        ("closed", BOTH), ("host", BOTH), ("profile", BOTH),
    ),
    "fp8": _of(
        FP8, ALL,
        ("coverage", OURS), ("few_steps", ALL), ("copies", BOTH), ("few_steps", BOTH),
        ("copies", VLLM),
        graphs=FEW_GRAPHS, deep_gemm_rows=DEEP_GEMM_ROWS,
    ),
    "30b": _of(
        EXPERTS, BOTH,
        ("coverage", OURS), ("few_steps", BOTH), ("copies", BOTH), ("few_steps", BOTH),
        ("kernels", BOTH),
    ),
    "vllm30b": _of(EXPERTS, VLLM, ("few_steps", VLLM), ("copies", VLLM)),
    "planted": _of(
        FOUR_LAYERS, (*UNCHANGED, *REFUSED),
        ("coverage", OURS), ("digest", UNCHANGED),
        graphs=(), is_timed=False,
    ),
    "smollm2": _of(SMOLLM2, BOTH, ("coverage", OURS), ("needle", BOTH), is_timed=False),
    "requests": _of(
        DENSE, BOTH,
        ("requests", BOTH), ("host", BOTH), ("profile", BOTH), ("large_steps", BOTH),
        ("requests", BOTH),
    ),
    "graphs": _of(
        DENSE, BOTH,
        ("requests", BOTH), ("large_steps", BOTH), ("requests", BOTH),
        graphs=LARGER_GRAPHS,
    ),
    "tp2": _of(
        DENSE, ALL,
        ("coverage", OURS), ("step", BOTH), ("copies", BOTH), ("collectives", ALL),
        ("step", ALL), ("copies", VLLM), ("prefill", BOTH), ("requests", BOTH),
        n_ranks=2,
    ),
}  # fmt: skip
UNTIMED = (*RUNS, *(name for name, stage in STAGES.items() if not stage.is_timed))
KNOWN = (*STAGES, *RUNS)
