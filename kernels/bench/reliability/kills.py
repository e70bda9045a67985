"""kill -9 at random points of a run, or while its reports are written, and --resume: what is lost?

`bench.reliability.fuzz kills` runs this. Each case starts a run of the scripted sampler, of the
embedded model or of a server, kills it, goes on as its message says, and compares samples and
reports with those of a run that was never killed; or kills `ndcheck report` and renders again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPTIONS: dict[str, tuple[str, ...]] = {
    "scripted": ("--model", "scripted:slow", "--max-tokens", "8", "--loads", "1,4", "-n", "24"),
    "embedded": ("--kernels", "stock", "--max-tokens", "8", "--loads", "1,4", "-n", "16"),
    "endpoint": ("--model", "mock", "--max-tokens", "8", "--loads", "1,4", "-n", "24"),
}
KINDS = (*OPTIONS, "report")
VARYING = ("elapsed_s", "achieved_batch_size", "step_batch_sizes", "n_retries", "connection")
"""What a second run of the same trials need not repeat."""
TABLES = ("samples.csv", "completions.csv", "loads.csv", "properties.csv", "summary.csv")
REPORTS = ("report.md", "report.html", *TABLES)
TIMEOUT_S = 300
RUN = "run"
"""Every directory has this name: a run is named after it, in every table."""


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "ndcheck", *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(*arguments: str) -> tuple[int, str]:
    """The exit code and what was said on stderr."""
    process = start(*arguments)
    try:
        _, said = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return -1, "hang"
    return process.returncode, said


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    while not file.exists() and process.poll() is None:
        time.sleep(0.002)


def kill_after(seconds: float, *arguments: str, begun: Path | None = None) -> None:
    """So long after the start, or after the file ``begun`` is there."""
    process = start(*arguments)
    if begun is not None:
        wait_for(begun, process)
    time.sleep(seconds)
    process.kill()
    process.communicate()


def samples(path: Path) -> list[dict[str, Any]]:
    lines = (path / "samples.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in VARYING} for line in lines]


def finished_lines(path: Path) -> list[bytes]:
    """The lines of the trials that were complete when a run was killed."""
    file = path / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    found: list[bytes] = []
    pending: list[bytes] = []
    for line in lines:
        if line.endswith(b"\n"):
            pending.append(line)
            if len(pending) == len(json.loads(line)["slots"]):
                found, pending = found + pending, []
    return found


@contextmanager
def mock_server() -> Iterator[str]:
    server = start("mock-server", "--step-ms", "20")
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.communicate()


class Setup:
    """What a run that was never killed leaves, and how long it took."""

    def __init__(self, kind: str, folder: Path, url: str) -> None:
        self.kind, self.folder = kind, folder
        self.address = ("--endpoint", url) if kind == "endpoint" else ()
        self.whole = folder / f"whole-{kind}" / RUN
        started = time.monotonic()
        process = start(*self.run(self.whole))
        wait_for(self.whole / "run.json", process)
        begun = time.monotonic()
        _, said = process.communicate(timeout=TIMEOUT_S)
        ended = time.monotonic()
        self.duration_s, self.measuring_s = ended - started, ended - begun
        self.code = process.returncode
        if self.code not in (0, 1, 3):
            raise RuntimeError(f"{kind} cannot run: {said}")
        self.samples = samples(self.whole)

    def run(self, path: Path) -> tuple[str, ...]:
        return ("run", *OPTIONS[self.kind], *self.address, "--html", "-q", "--out", str(path))

    def resume(self, path: Path) -> tuple[str, ...]:
        return ("run", "--resume", str(path), *self.address, "--html", "-q")

    def check(self, number: int, rng: random.Random) -> tuple[str, str | None]:
        """What was there when it was killed, and what went wrong, if anything."""
        path = self.folder / f"{self.kind}-{number}" / RUN
        if rng.random() < 0.25:
            kill_after(rng.uniform(0.0, 1.1) * self.duration_s, *self.run(path))
        else:  # Most of a short run is loading, where nothing can be lost.
            seconds = rng.uniform(0.0, 1.1) * self.measuring_s
            kill_after(seconds, *self.run(path), begun=path / "run.json")
        before = finished_lines(path)
        is_begun = (path / "run.json").exists()
        state = f"killed after {len(before)} lines" if is_begun else "killed before run.json"
        code, said = finish(*self.resume(path))
        if not is_begun:
            if code != 2 or "holds no run" not in said:
                return state, f"--resume of nothing ended with {code}: {said}"
            code, said = finish(*self.run(path))
        if code != self.code:
            return state, f"exit code {code} instead of {self.code}: {said}"
        after = (path / "samples.jsonl").read_bytes().splitlines(keepends=True)
        if after[: len(before)] != before:
            return state, "finished trials were lost"
        if samples(path) != self.samples:
            return state, "the samples are not those of a run that was never killed"
        completions = [(p / "completions.csv").read_bytes() for p in (path, self.whole)]
        if completions[0] != completions[1]:
            return state, "the completions are others"
        left = [file.name for file in path.glob(".*")]
        if left:
            return state, f"temporary files were left: {left}"
        shutil.rmtree(path.parent)
        return state, None


def check_report(whole: Path, folder: Path, number: int, rng: random.Random) -> str | None:
    """Kill a report while it is written; the next one has to be as if nothing had been."""
    path = folder / f"report-{number}" / RUN
    shutil.copytree(whole, path)
    command = ("report", str(path), "--html", "--json")
    finish(*command)
    kept = {name: (path / name).read_bytes() for name in (*REPORTS, "run.json", "samples.jsonl")}
    kill_after(rng.uniform(0.3, 2.5), *command)
    for name, content in kept.items():
        if (path / name).read_bytes() != content:
            return f"{name} was damaged"
    finish(*command)
    for name, content in kept.items():
        if (path / name).read_bytes() != content:
            return f"{name} is another after a second report"
    left = [file.name for file in path.glob(".*")]
    shutil.rmtree(path.parent)
    return f"temporary files were left: {left}" if left else None


def kill_and_resume(
    count: int, seed: int, passed: Callable[[str], None], failed: Callable[[str, str], None]
) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="ndcheck-kills-") as name, mock_server() as url:
        folder = Path(name)
        setups = {kind: Setup(kind, folder, url) for kind in OPTIONS}
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            if kind == "report":
                problem = check_report(setups["scripted"].whole, folder, number, rng)
                state = "killed while reports were written"
            else:
                state, problem = setups[kind].check(number, rng)
            if problem is None:
                state = state if state.startswith("killed before") else state.partition(" after")[0]
                passed(f"{kind}: {state}")
            else:
                failed(f"{kind}: {problem[:60]}", f"case {number}, seed {seed}: {state}: {problem}")
