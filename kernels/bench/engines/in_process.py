"""ndcheck's arms and vLLM's modes side by side: bits, decode step, and whole loads, of an 8B shape.

    PYTHONPATH=kernels python -m bench.engines.in_process OUT_DIR [--parts ndcheck,vllm]

On one GPU of 140 GB, with vLLM installed. All parts take about nine minutes on an H200, most of it
vLLM's two starts and the last measure; ``--parts`` runs some of them, into the same OUT_DIR.
Each engine runs in a process of its own, one after the other, on the same random checkpoint, and
greedily. Writes PART.csv as it goes, then engines.csv, table.md, environment.json and, where
matplotlib is installed, decode.png of all the parts that are there.

Measures: ``copies`` of one prompt at several batch sizes, for the number of distinct completions
and the first token that differs from the completion alone; ``step``, a decode step by batch size;
``requests``, 1000 of 90-110 tokens all at once; ``long``, 1000 completions of 1000 tokens, and the
first token that differs from the commonest one. vLLM is timed through `LLM.generate` without
logprobs, its Python included. ndcheck's step is a captured graph, and its whole loads are static
batches of 500 rows, where every row decodes as long as the longest. ``long`` is not run in its
stock arm, where transformers copies keys and values for every head: that takes 15 minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.table import Table

PARTS = ("ndcheck-stock", "ndcheck-invariant", "vllm-stock", "vllm-invariant")
COPIES, N_COPY_TOKENS = (1, 1, 2, 4, 8, 16, 32, 64, 128, 256), 150
STEP_BATCHES, N_STEPS, N_REPEATS = (1, 8, 32, 64, 128, 256), 32, 3
N_REQUESTS = 1000
REQUEST_TOKENS = [90 + i % 21 for i in range(N_REQUESTS)]
N_LONG_TOKENS, STATIC_ROWS = 1000, 500
FIGURES = ("elapsed_s", "step_ms", "n", "unique", "modal", "diverges_from", "diverges_to")
PROMPT = list(range(1000, 1020))

Generate = Callable[[int, Sequence[int]], list[tuple[int, ...]]]
"""(batch size, tokens of each row) -> token ids of each row."""


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    return next((t for t, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def bits(
    completions: list[tuple[int, ...]], reference: tuple[int, ...] | None = None
) -> dict[str, object]:
    """Distinct completions, the number of the commonest, and the range of first divergences.

    From the reference, or else from the commonest.
    """
    counts = Counter(completions)
    if reference is None:
        reference = counts.most_common(1)[0][0]
    forks = [t for c in counts if (t := first_difference(c, reference)) is not None]
    return {
        "n": len(completions),
        "unique": len(counts),
        "modal": counts.most_common(1)[0][1],
        "diverges_from": min(forks, default=""),
        "diverges_to": max(forks, default=""),
    }


def measure(
    table: Table,
    part: str,
    generate: Generate,
    step_ms: Callable[[int], float],
    most_rows: int = N_REQUESTS,
) -> None:
    """All measures of one part, the longest last: a run cut short keeps the others.

    ``most_rows`` is how many of a whole load are asked for at a time.
    """

    def add(name: str, batch: object, **found: object) -> None:
        table.add(part=part, measure=name, batch=batch, **{**dict.fromkeys(FIGURES, ""), **found})

    generate(1, [8])
    completions: list[tuple[int, ...]] = []
    started = time.perf_counter()
    for batch_size in COPIES:
        completions += generate(batch_size, [N_COPY_TOKENS] * batch_size)
    add(
        "copies",
        f"{COPIES[0]}-{COPIES[-1]}",
        elapsed_s=time.perf_counter() - started,
        **bits(completions, completions[0]),
    )
    for batch_size in STEP_BATCHES:
        add("step", batch_size, step_ms=step_ms(batch_size))
    started = time.perf_counter()
    for first in range(0, N_REQUESTS, most_rows):
        generate(most_rows, REQUEST_TOKENS[first : first + most_rows])
    add("requests", most_rows, elapsed_s=time.perf_counter() - started)
    if part == "ndcheck-stock":
        return
    completions = []
    started = time.perf_counter()
    for _ in range(N_REQUESTS // most_rows):
        completions += generate(most_rows, [N_LONG_TOKENS] * most_rows)
    add("long", most_rows, elapsed_s=time.perf_counter() - started, **bits(completions))


def measure_vllm(table: Table, part: str, checkpoint: str) -> None:
    import vllm

    llm = vllm.LLM(
        checkpoint,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_seqs=1024,
        max_model_len=2048,
    )

    def generate(batch_size: int, n_tokens: Sequence[int]) -> list[tuple[int, ...]]:
        outputs = llm.generate(
            [{"prompt_token_ids": PROMPT}] * batch_size,
            [
                vllm.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
                for n in n_tokens
            ],
            use_tqdm=False,
        )
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    def elapsed_s(batch_size: int, n_tokens: int) -> float:
        started = time.perf_counter()
        generate(batch_size, [n_tokens] * batch_size)
        return time.perf_counter() - started

    def step_ms(batch_size: int) -> float:
        """What N_STEPS tokens more take, by their number."""
        times = [
            elapsed_s(batch_size, 1 + N_STEPS) - elapsed_s(batch_size, 1) for _ in range(N_REPEATS)
        ]
        return statistics.median(times) / N_STEPS * 1000

    measure(table, part, generate, step_ms)


def measure_ndcheck(table: Table, part: str, checkpoint: str) -> None:
    import torch

    from bench.models.decode import step_ms
    from ndcheck.records import Decoding, Load, Probe, Trial
    from ndcheck.request import DEFAULTS
    from ndcheck.samplers.local.sampler import TransformersSampler

    arm: Any = part.removeprefix("ndcheck-")
    sampler = TransformersSampler(
        replace(DEFAULTS, model=checkpoint, device="cuda", arms=(arm,), random_weights=0)
    )
    # The same token ids as vLLM gets, whatever tokenizer stands in for the model's own.
    sampler._prompts.encode = lambda prompt: PROMPT  # type: ignore[method-assign]
    sampler._prompts.token_texts = lambda token_ids: ("",) * len(token_ids)  # type: ignore
    sampler._stop_ids = set()

    def generate(batch_size: int, n_tokens: Sequence[int]) -> list[tuple[int, ...]]:
        load = Load(batch_size, tuple(range(batch_size)))
        trial = Trial(0, arm, "p1", "batch-size", load, 0)
        samples = sampler.sample(trial, Probe("p1", "x"), Decoding(max(n_tokens)))
        return [s.token_ids[:n] for s, n in zip(samples, n_tokens, strict=True)]

    def captured_step_ms(batch_size: int) -> float:
        torch.cuda.empty_cache()
        return step_ms(sampler, arm, batch_size)

    measure(table, part, generate, captured_step_ms, STATIC_ROWS)


def write_checkpoint() -> str:
    """Random bf16 weights of seed 0, in a process of its own, so that no GPU memory stays taken."""
    code = (
        "import transformers; from dataclasses import replace\n"
        "from bench.models.decode import SHAPES; from ndcheck.request import DEFAULTS\n"
        "from ndcheck.samplers.vllm.checkpoint import random_checkpoint\n"
        "source = str(SHAPES / 'qwen3-8b')\n"
        "config = transformers.AutoConfig.from_pretrained(source)\n"
        "print(random_checkpoint(source, config, replace(DEFAULTS, random_weights=0)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def environment() -> dict[str, object]:
    import torch

    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    versions = {}
    for package in ("torch", "triton", "transformers", "vllm", "ndcheck"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"gpu": gpu, "python": platform.python_version(), "cuda": torch.version.cuda, **versions}


def write_summary(out: Path) -> None:
    """engines.csv, table.md and decode.png of the parts that are there."""
    rows: list[dict[str, str]] = []
    for part in PARTS:
        if (out / f"{part}.csv").is_file():
            with (out / f"{part}.csv").open(encoding="utf-8", newline="") as file:
                rows += csv.DictReader(file)
    table = Table(out / "engines.csv", echo=False)
    for row in rows:
        table.add(**row)
    parts = list(dict.fromkeys(row["part"] for row in rows))
    cells = {(row["part"], row["measure"], row["batch"]): row for row in rows}

    def line(name: str, measure: str, batch: object, text: Callable[[dict[str, str]], str]) -> str:
        found = [cells.get((part, measure, str(batch))) for part in parts]
        return f"| {name} | {' | '.join(text(row) if row else '' for row in found)} |"

    def divergence(row: dict[str, str]) -> str:
        where = f", from token {int(row['diverges_from']) + 1}" if row["diverges_from"] else ""
        return f"{row['unique']} of {row['n']}{where}"

    def seconds(row: dict[str, str]) -> str:
        return f"{float(row['elapsed_s']):.1f} s"

    lines = [
        f"| | {' | '.join(part.replace('-', ', ') for part in parts)} |",
        f"|---|{'---|' * len(parts)}",
        line(f"unique, {N_COPY_TOKENS} tokens, copies at B = {COPIES[0]}-{COPIES[-1]}",
             "copies", f"{COPIES[0]}-{COPIES[-1]}", divergence),
        *(line(f"decode step, B = {b}", "step", b, lambda row: f"{float(row['step_ms']):.2f} ms")
          for b in STEP_BATCHES),
    ]  # fmt: skip
    whole = {
        (row["part"], row["measure"]): row for row in rows if row["measure"] in ("requests", "long")
    }
    for name, measure, text in (
        (f"{N_REQUESTS} requests of 90-110 tokens", "requests", seconds),
        (f"{N_REQUESTS} x {N_LONG_TOKENS} tokens", "long", seconds),
        ("unique of them", "long", divergence),
    ):
        found = [whole.get((part, measure)) for part in parts]
        lines.append(f"| {name} | {' | '.join(text(row) if row else '' for row in found)} |")
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    plot(out, parts, cells)


def plot(out: Path, parts: list[str], cells: dict[tuple[str, str, str], dict[str, str]]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for part in parts:
        points = [(b, cells.get((part, "step", str(b)))) for b in STEP_BATCHES]
        known = [(b, float(row["step_ms"])) for b, row in points if row]
        axes.plot(*zip(*known, strict=True), marker="o", label=part.replace("-", ", "),
                  linestyle="--" if part.startswith("vllm") else "-")  # fmt: skip
    axes.set(xscale="log", xlabel="rows in the batch", ylabel="decode step, ms", ylim=(0, None))
    axes.set_xticks(STEP_BATCHES, map(str, STEP_BATCHES))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(out / "decode.png", dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", default="ndcheck,vllm", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wanted = [p for p in PARTS if any(p.startswith(w) for w in options.parts.split(","))]
    if not wanted:
        parser.error(f"--parts {options.parts}: choose from {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.checkpoint:
        table = Table(options.out / f"{wanted[0]}.csv")
        work = measure_vllm if wanted[0].startswith("vllm") else measure_ndcheck
        work(table, wanted[0], options.checkpoint)
        return 0
    about = json.dumps(environment(), indent=2) + "\n"
    (options.out / "environment.json").write_text(about, encoding="utf-8")
    print(about, flush=True)
    status = 0
    checkpoint = write_checkpoint()
    for part in wanted:
        started = time.perf_counter()
        status |= subprocess.run(
            [
                sys.executable,
                "-m",
                "bench.engines.in_process",
                options.out,
                "--parts",
                part,
                "--checkpoint",
                checkpoint,
            ],
            env={
                **os.environ,
                "VLLM_BATCH_INVARIANT": str(int(part == "vllm-invariant")),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            },
            check=False,
        ).returncode
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    write_summary(options.out)
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
