"""Wall time of `ndcheck run` of the embedded model at its defaults, on an NVIDIA GPU, by parts.

    PYTHONPATH=.:kernels python -m bench.measurement.run_seconds FOLDER [OPTION ...]

Three runs, each in a process of its own: with nothing in Triton's cache nor in ndcheck's, and twice
with what the first left there. Before them a short one, not timed, reads torch's and transformers'
files once and writes their .pyc into FOLDER. OPTIONs go to all of them. Of each run, in seconds:

- `stages`: when each began, and how long it took: those that `ndcheck run` names, which contain
  each other, and the first trial of each arm;
- `totals`: how many, how long together, and the longest: trials by arm and purpose, and of these
  prompts, decoding, feeding and captures of CUDA graphs; proofs of borrowed products; the report;
- `compiled`: kernels that this process compiled itself, by name; `found`, in Triton's cache;
- `ahead`: when each process that compiles beside the run was done.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

TIMED = """
import atexit, functools, json, sys, time
from collections import defaultdict
from contextlib import contextmanager, nullcontext

out, began = sys.argv.pop(1), float(sys.argv.pop(1))
stages, compiled = [["starting Python", 0.0, time.monotonic() - began]], defaultdict(list)
totals, found, hits = defaultdict(list), [0, 0.0], []

@contextmanager
def stage(what):
    start = time.monotonic()
    try:
        yield
    finally:
        stages.append([what, start - began, time.monotonic() - start])

@contextmanager
def total(what):
    start = time.monotonic()
    try:
        yield
    finally:
        totals[what].append(time.monotonic() - start)

def watch(owner, name, what):
    own = getattr(owner, name)
    def watched(*arguments, **options):
        with total(what(*arguments) if callable(what) else what):
            return own(*arguments, **options)
    setattr(owner, name, functools.wraps(own)(watched))

def compile_and_note(self, *arguments):
    start = time.monotonic()
    hits.clear()
    try:
        return compile_(self, *arguments)
    finally:
        seconds = time.monotonic() - start
        if hits and all(hits):
            found[:] = found[0] + 1, found[1] + seconds
        else:
            compiled[self.__name__].append(seconds)

@functools.cache
def watch_all():
    global compile_
    import torch
    from ndcheck.cli import run_session
    from ndcheck.samplers.local import batch, sampler
    from ndcheck.samplers.local.decoding import replaying, steps
    name = lambda _, trial, *__: f"{trial.arm} {trial.purpose}"
    watch(sampler.TransformersSampler, "sample", name)
    watch(batch.ExactBatch, "compute_prompt", "prompts")
    watch(replaying.Replayed, "_capture", "captures")
    for name, what in (("run", "decoding"), ("feed", "feeding")):
        watch(steps.DecodeSteps, name, what)
    watch(run_session, "report", "report")
    if torch.cuda.is_available():
        import triton
        from triton.runtime import jit
        from ndcheck_kernels.cuda.products import borrowed
        watch(borrowed, "prove", "proofs")
        compile_, jit.JITFunction._do_compile = jit.JITFunction._do_compile, compile_and_note
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)

@contextmanager
def doing(what):
    is_shown = not what.startswith("sampling trial")
    with stage(what) if is_shown else nullcontext(), own_doing(what):
        yield
    if what.startswith("importing"):
        watch_all()

@atexit.register
def write():
    document = {"stages": stages, "totals": totals, "compiled": compiled, "found": found}
    with open(out, "w") as file:
        json.dump(document, file)

from ndcheck import errors
own_doing, errors.doing = errors.doing, doing
with stage("importing the command line"):
    from ndcheck.__main__ import main
    from ndcheck.cli import app
main()
"""


def main(folder: Path, *options: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    caches = {
        "PYTHONPYCACHEPREFIX": str(folder / "pyc"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    run(folder / "first", caches, *options, "-n", "2", "--max-tokens", "4", "--loads", "1")
    for name in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        shutil.rmtree(caches[name], ignore_errors=True)
    results = []
    for name in ("cold", "warm", "again"):
        result = {"run": name, **run(folder / name, caches, *options)}
        if result["exit"] not in (0, 1):
            sys.exit(f"{name}: exit code {result['exit']}, no verdict: see {folder / name}.txt")
        print(json.dumps(result), flush=True)
        results.append(result)
        (folder / "run_seconds.json").write_text(json.dumps(results, indent=1))


def run(out: Path, caches: dict[str, str], *options: str) -> dict[str, object]:
    shutil.rmtree(out, ignore_errors=True)
    seen = out.with_suffix(".json")
    seen.unlink(missing_ok=True)
    began, began_at = time.monotonic(), time.time()
    command = [
        *(sys.executable, "-c", TIMED, str(seen), str(began)),
        *("run", "--out", str(out), *options),
    ]
    environment = {**os.environ, **caches}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # As a package's installation does.
    with out.with_suffix(".txt").open("w") as log:
        child = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
    elapsed = time.monotonic() - began
    parts = json.loads(seen.read_text())
    marks = Path(caches["TRITON_CACHE_DIR"]).glob("ndcheck-*")
    made = sorted(mark.stat().st_mtime - began_at for mark in marks)
    by_kernel = sorted(parts["compiled"].items(), key=lambda item: -sum(item[1]))
    return {
        "exit": child.returncode,
        "seconds": round(elapsed, 1),
        "stages": [(what, round(at, 1), round(took, 1)) for what, at, took in parts["stages"]],
        "totals": {
            what: (len(each), round(sum(each), 1), round(max(each), 1))
            for what, each in parts["totals"].items()
        },
        "compiled_here": round(sum(map(sum, parts["compiled"].values())), 1),
        "compiled": {name: (len(each), round(sum(each), 2)) for name, each in by_kernel},
        "found": (parts["found"][0], round(parts["found"][1], 1)),
        "ahead": [round(seconds, 1) for seconds in made if seconds > 0],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
