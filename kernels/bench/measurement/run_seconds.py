"""Wall time of `ndcheck run` of the embedded model at its defaults, on an NVIDIA GPU.

    PYTHONPATH=.:kernels python -m bench.measurement.run_seconds FOLDER

Three runs, each in a process of its own: with nothing in Triton's cache nor in ndcheck's, and twice
with what the first left there. Before them a short one, not timed, reads torch's and transformers'
files once and writes their .pyc into FOLDER, as a package's installation does. Of each run: seconds
in all, until the first trial ended, in trials, and in Triton's compiler, by kernel.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

TIMED = """
import json, sys, time
from pathlib import Path
from triton.runtime import jit
compiles, compile_, out = [], jit.JITFunction._do_compile, sys.argv.pop(1)

def timed(self, *arguments, **options):
    start = time.monotonic()
    try:
        return compile_(self, *arguments, **options)
    finally:
        compiles.append((self.__name__, time.monotonic() - start))
        Path(out).write_text(json.dumps(compiles))

jit.JITFunction._do_compile = timed
from ndcheck.cli.app import run_command_line
raise SystemExit(run_command_line(sys.argv[1:]))
"""


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    caches = {
        "PYTHONPYCACHEPREFIX": str(folder / "pyc"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    run(folder / "first", caches, "-n", "2", "--max-tokens", "4", "--loads", "1")
    for name in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        shutil.rmtree(caches[name], ignore_errors=True)
    results = []
    for name in ("cold", "warm", "again"):
        result = {"run": name, **run(folder / name, caches)}
        print(json.dumps(result), flush=True)
        results.append(result)
        (folder / "run_seconds.json").write_text(json.dumps(results, indent=1))


def run(out: Path, caches: dict[str, str], *options: str) -> dict[str, object]:
    shutil.rmtree(out, ignore_errors=True)
    compiles_file = out.with_suffix(".compiles")
    compiles_file.unlink(missing_ok=True)
    command = [sys.executable, "-c", TIMED, str(compiles_file), "run", "--out", str(out), *options]
    began = time.monotonic()
    with out.with_suffix(".txt").open("w") as log:
        child = subprocess.Popen(command, env={**os.environ, **caches}, stdout=log, stderr=log)
        until_first = None
        while child.poll() is None:
            time.sleep(0.05)
            lines = out / "samples.jsonl"
            if until_first is None and lines.exists() and lines.stat().st_size:
                until_first = time.monotonic() - began
    elapsed = time.monotonic() - began
    compiles: dict[str, list[float]] = defaultdict(list)
    if compiles_file.exists():
        for kernel, seconds in json.loads(compiles_file.read_text()):
            compiles[kernel].append(seconds)
    by_kernel = sorted(compiles.items(), key=lambda item: -sum(item[1]))
    return {
        "exit": child.returncode,
        "seconds": round(elapsed, 1),
        "until_first_trial": until_first and round(until_first, 1),
        "in_trials": round(sum(trials(out / "samples.csv").values()), 1),
        "compiling": round(sum(map(sum, compiles.values())), 1),
        "compiled": {name: [len(each), round(sum(each), 2)] for name, each in by_kernel},
    }


def trials(path: Path) -> dict[str, float]:
    """Seconds of each."""
    if not path.exists():
        return {}
    with path.open() as file:
        return {row["trial_id"]: float(row["elapsed_s"] or 0) for row in csv.DictReader(file)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
