"""One model on several GPUs: the reference study's own, Qwen3-235B-A22B, in FP8; and an 8B.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.models.tensor_parallel --out DIR [--parts long,8b]

Weights are random, of seed 0: each rank draws one module at a time and keeps its shard. Parts, the
most important first, and what they take on two H200 of 141 GB:

long    1000 completions of 1000 tokens of the 235B, in batches of at most 128, invariant arm, 6 min
ladder  both arms of the 235B at 1, 8, 64 and 128 rows, 32 tokens, 5 min; stock goes through one
        expert after the other, with weights dequantised for each product: its time is no measure
8b      an 8B on one GPU and on all, with --tp-groups, whose bits must be the same, and without,
        the control, 4 min
steps   medians of captured decode steps: the 8B as above, and the 235B, 5 min

A part that ends in time is not repeated, and one that was cut goes on: DIR/runs.tar.xz has all that
was measured, is written before --seconds are over, and is read at the start. Prints a line for
every run and arm, with the study's own figures. With --bf16 the 235B is 470 GB, for four GPUs, and
its stock arm transformers' own. --tiny runs everything on a CPU, by gloo, in small.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.models.rank_memory import rank_memory
from ndcheck.storage.run_directory import SampleReader, read_run

ROOT = Path(__file__).parents[3]
SHAPES = Path(__file__).parents[1] / "shapes"
LARGE, SMALL = "qwen3-235b-a22b-fp8", "qwen3-8b"
PROMPT = "Tell me about Richard Feynman"
PROMPT_COLUMNS = 32
"""Room for the prompt, in tokens."""
STUDY = "the study: 80 unique of 1000, the first 102 tokens in common, then 992 and 8"
GRACE_S = 45
"""What the ranks get to end when they are told to: rank 0 waits 10 s, torchrun 30 s."""
LEAST_S = 30
"""With less time nothing is begun."""
# Half of the heads, features and experts of a block are whole blocks of 128 on four ranks, too.
TINY = {
    LARGE: {
        "vocab_size": 4096, "hidden_size": 128, "head_dim": 128, "moe_intermediate_size": 512,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    SMALL: {
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
        "initializer_range": 0.2,
        "dtype": "float32",  # Few roundings of so small a model show in bf16.
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """One `ndcheck run`: its folder, shape, number of ranks, groups of sums, and other options."""

    folder: str
    shape: str
    n_ranks: int
    groups: int | None
    arms: str
    is_bf16: bool
    loads: str
    n_samples: int
    n_tokens: int

    @property
    def most_rows(self) -> int:
        return max(map(int, self.loads.split(",")))


def runs_of(part: str, options: argparse.Namespace) -> list[Run]:
    n, is_tiny, bf16 = options.tp, options.tiny, options.bf16
    name = "235b-bf16" if bf16 else "235b"
    # Every size is a load of its own, of copies alone: with the probe alone four times, 1000.
    sizes = "3,4" if is_tiny else ",".join(map(str, range(121, 129)))
    ladder, both = "1,4" if is_tiny else "1,8,64,128", "stock,invariant"
    if part == "long":
        n_samples, n_tokens = (11, 8) if is_tiny else (1000, 1000)
        return [Run(f"{name}-long", LARGE, n, None, "invariant", bf16, sizes, n_samples, n_tokens)]
    if part == "ladder":
        n_samples, n_tokens = (9, 4) if is_tiny else (204, 32)
        return [Run(f"{name}-ladder", LARGE, n, None, both, bf16, ladder, n_samples, n_tokens)]
    n_samples, n_tokens = (9, 6) if is_tiny else (204, 100)
    spread = [(n_ranks, options.groups) for n_ranks in sizes_up_to(n)] + [(n, None)]
    return [
        Run(
            f"8b-tp{n_ranks}{f'-groups{groups}' if groups else ''}", SMALL, n_ranks, groups,
            "invariant" if groups else both, False, ladder, n_samples, n_tokens,
        )
        for n_ranks, groups in reversed(spread)
    ]  # fmt: skip


def sizes_up_to(n_ranks: int) -> list[int]:
    return [size for size in (1, 2, 4, 8) if size <= n_ranks]


class Session:
    """Where runs are, and how much time is left for them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ends = time.monotonic() + options.seconds
        self.out: Path = options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.packed = self.out / "runs.tar.xz"
        self.work = Path(tempfile.gettempdir()) / f"ndcheck-ranks-{os.getuid()}" / self.out.name
        self.work.mkdir(parents=True, exist_ok=True)
        if self.packed.is_file():
            with tarfile.open(self.packed) as archive:
                archive.extractall(self.work, filter="data")

    def pack(self) -> None:
        """Samples repeat each other, so that a thousand of a thousand tokens take little room."""
        part = self.packed.with_suffix(".part")
        with tarfile.open(part, "w:xz", preset=3) as archive:
            for path in sorted(self.work.iterdir()):
                archive.add(path, path.name)
        part.replace(self.packed)

    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def run(self, arguments: list[str], n_ranks: int) -> int | None:
        """The exit code of a module on ``n_ranks`` ranks, or None where its time was over."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
        command = [sys.executable, *(launcher if n_ranks > 1 else []), "-m", *arguments]
        environment = {
            # torchrun would set it for several ranks, and threads must not differ between sizes.
            "OMP_NUM_THREADS": "1",
            # With 20 GB beside the weights, pieces of freed batches must not lie unused.
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            **os.environ,
        }
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        try:
            return process.wait(max(0, self.left_s()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None

    def model(self, shape: str) -> Path:
        """The folder of its config.json, from `ROOT` if it lies there: records name no machine."""
        if not self.options.tiny:
            return (SHAPES / shape).relative_to(ROOT)
        folder = self.work / f"{shape}-tiny"
        folder.mkdir(exist_ok=True)
        config = json.loads((SHAPES / shape / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | TINY[shape], indent=2))
        return folder


def measure(run: Run, session: Session) -> Path | None:
    """Measure, or go on with what is there: the run's directory, or None where time was over.

    Raises RuntimeError where it fails, or does not fit into the GPUs' memory.
    """
    path = session.work / run.folder
    if (path / "run.json").exists():
        if read_run(path).status == "finished":
            return path
        arguments = ["--resume", str(path)]
    else:
        model = session.model(run.shape)
        check_memory(run, model)
        arguments = [
            *("--model", str(model), "--random-weights", "0", "--axes", "batch-size"),
            *("--prompt", PROMPT, "-n", str(run.n_samples), "--max-tokens", str(run.n_tokens)),
            *("--loads", run.loads, "--kernels", run.arms, "--out", str(path)),
            *(("--tp", str(run.n_ranks)) if run.n_ranks > 1 else ()),
            *(("--tp-groups", str(run.groups)) if run.groups else ()),
            *(("--dequantise",) if run.is_bf16 else ()),
        ]
    print(f"-- {run.folder}: {session.left_s():.0f} s left", flush=True)
    code = session.run(["ndcheck", "run", *arguments], run.n_ranks)
    session.pack()
    # Not the exit code: torchrun's is 1 for every verdict but PASS.
    if (path / "run.json").exists() and read_run(path).status == "finished":
        return path
    if code is None:
        print(f"{run.folder}: cut; the next call goes on with it", flush=True)
        return None
    raise RuntimeError(f"{run.folder} did not finish (exit code {code})")


def check_memory(run: Run, model: Path) -> None:
    """Print what each GPU needs; raise RuntimeError where one has less."""
    n_columns = run.n_tokens + PROMPT_COLUMNS
    needed = rank_memory(ROOT / model, run.n_ranks, run.most_rows, n_columns, is_bf16=run.is_bf16)
    print(f"{run.folder}, on each of {run.n_ranks}: {needed}", flush=True)
    if not torch.cuda.is_available():
        return
    if (n_gpus := torch.cuda.device_count()) < run.n_ranks:
        raise RuntimeError(f"{run.folder} needs {run.n_ranks} GPUs, and here are {n_gpus}")
    # Not what is free, for which this process would take some of it.
    there = min(torch.cuda.get_device_properties(i).total_memory for i in range(run.n_ranks))
    if needed.most > there:
        raise RuntimeError(
            f"{run.folder} needs {needed.most / 1e9:.0f} GB on each of {run.n_ranks} GPUs, and one "
            f"has {there / 1e9:.0f} GB: give more of them (--tp)"
        )


def measure_steps(session: Session) -> list[str]:
    """Captured steps, of every way to spread a shape; returns those that had no time, or failed."""
    n, groups = session.options.tp, session.options.groups
    batches = "1,4" if session.options.tiny else "1,8,32,64,128,256"
    ways = [
        *((SMALL, n, g, batches) for g in (None, groups)),
        *((SMALL, 1, g, batches) for g in (None, groups)),
        (LARGE, n, None, batches.removesuffix(",256")),
    ]
    left = []
    for shape, n_ranks, g, sizes in ways:
        table = session.work / f"steps-{shape}-tp{n_ranks}{f'-groups{g}' if g else ''}.csv"
        if table.exists():
            continue
        code = None
        if session.left_s() > LEAST_S:
            print(f"-- {table.stem}: {session.left_s():.0f} s left", flush=True)
            # What was cut is no whole table, so it is measured anew.
            part = table.with_suffix(".part")
            arguments = ["bench.models.rank_steps", str(session.model(shape)), "--batches", sizes]
            arguments += ["--out", str(part), "--tp", str(n_ranks)]
            code = session.run([*arguments, *(["--tp-groups", str(g)] if g else [])], n_ranks)
            if code == 0:
                part.replace(table)
            session.pack()
        if code != 0:
            left.append(table.stem)
    return left


def rows(path: Path) -> Iterator[tuple[str, ...]]:
    names = ("arm", "n_samples", "n_unique", "common_prefix_tokens", "tokens_per_s")
    with (path / "summary.csv").open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            yield (*(row[name][:9] for name in names), row["slowdown_vs_stock"][:5])


def bits(path: Path) -> set[tuple[tuple[int, ...], tuple[str, ...]]]:
    """The distinct completions of the invariant arm, with the digests of their logits."""
    return {
        (sample.token_ids, sample.row_digests)
        for sample in SampleReader(path)
        if sample.arm == "invariant" and sample.role != "control"
    }


def compare_bits(paths: dict[Run, Path]) -> bool:
    """Whether every number of ranks with groups has the same bits, and by rank there are others."""
    grouped = {run.n_ranks: bits(path) for run, path in paths.items() if run.groups}
    by_rank = [bits(path) for run, path in paths.items() if not run.groups]
    if not grouped or not by_rank:
        return True
    same = len(set(map(frozenset, grouped.values()))) == 1
    differs = all(found not in grouped.values() for found in by_rank)
    sizes = ", ".join(map(str, sorted(grouped)))
    print(f"8b, --tp-groups: bits at {sizes} ranks {'equal' if same else 'DIFFER'}; "
          f"without, the control, {'others' if differs else 'THE SAME'}")  # fmt: skip
    return same and differs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for runs.tar.xz")
    parser.add_argument("--parts", default="long,ladder,8b,steps")
    parser.add_argument("--tp", type=int, default=2, choices=(2, 4), help="GPUs (default: 2)")
    parser.add_argument("--groups", type=int, default=8, help="for --tp-groups (default: 8)")
    parser.add_argument("--seconds", type=float, default=500, help="for this call (default: 500)")
    parser.add_argument("--bf16", action="store_true", help="the 235B's weights dequantised")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on CPU")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - {"long", "ladder", "8b", "steps"}:
        parser.error(f"--parts {','.join(sorted(unknown))}: choose from long, ladder, 8b, steps")
    session = Session(options)
    names = ("run", "arm", "samples", "unique", "common", "tok/s", "slowdown")
    print("  ".join(f"{name:>9}" for name in names), f"\n({STUDY})", flush=True)
    paths, failed, left = measure_parts(parts, session)
    is_same = compare_bits({run: path for run, path in paths.items() if run.shape == SMALL})
    large = [bits(path) for run, path in paths.items() if run.shape == LARGE]
    is_right = is_same and all(len(found) == 1 for found in large)
    print(f"failed: {', '.join(failed) or 'nothing'}; for the next call: {', '.join(left) or '-'}")
    return 4 if failed else 1 if not is_right else 3 if left else 0


def measure_parts(
    parts: list[str], session: Session
) -> tuple[dict[Run, Path], list[str], list[str]]:
    """What was measured, each run's lines printed; which runs failed, and which had no time."""
    paths: dict[Run, Path] = {}
    failed: list[str] = []
    left: list[str] = []
    for part in parts:
        if part == "steps":
            left += measure_steps(session)
            continue
        for run in runs_of(part, session.options):
            try:
                path = measure(run, session) if session.left_s() > LEAST_S else None
            except RuntimeError as error:  # The other parts may still work.
                print(error, flush=True)
                failed.append(run.folder)
                continue
            if path is None:
                left.append(run.folder)
                continue
            paths[run] = path
            for row in rows(path):
                print("  ".join(f"{cell:>9}" for cell in (run.folder, *row)), flush=True)
    return paths, failed, left


if __name__ == "__main__":
    sys.exit(main())
