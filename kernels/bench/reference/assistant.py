"""The study's prompt on SmolLM2-135M-Instruct, an assistant that anyone can have from PyPI.

    PYTHONPATH=kernels python -m bench.reference.assistant results/trained h200
    PYTHONPATH=kernels python -m bench.reference.assistant results/trained cpu
    PYTHONPATH=kernels python -m bench.reference.assistant results/trained vllm --model DIR
    PYTHONPATH=kernels python -m bench.reference.assistant results/trained llama.cpp \
        --endpoint http://127.0.0.1:8080/v1 --model any
    PYTHONPATH=kernels python -m bench.reference.assistant results/trained transformers-serve \
        --endpoint http://127.0.0.1:8000/v1 --model DIR
    PYTHONPATH=kernels python -m bench.reference.assistant results/trained summary

Run from the repository's root. A run is one folder of OUT; options that follow go to `ndcheck run`.
DIR is the converted model, which `ndcheck run --model smollm2` leaves in ~/.cache/ndcheck/models.
``summary`` writes the table and the picture of OUT's README.md from what is committed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.reference.experiment import FINISHED, PROMPT, ROOT, TINY, keep_files
from bench.reference.summary import summarise
from bench.table import rows_of

WIDE, NARROW = "1,2,4,8,16,32,64,128,256", "1,2,4,8,16,32"
ALL = ("--chat", "--prompt", PROMPT, "-n", "1000", "--max-tokens", "200")
RUNS: dict[str, tuple[str, ...]] = {
    "h200": ("--model", "smollm2", "--device", "cuda", *ALL, "--loads", WIDE),
    "cpu": ("--model", "smollm2", "--device", "cpu", *ALL, "--loads", NARROW),
    "vllm": ("--engine", "vllm", *ALL, "--loads", WIDE),
    "llama.cpp": (*ALL, "--loads", NARROW),
    "transformers-serve": (*ALL, "--loads", NARROW),
}
TINY_MODEL = ("--model", "builtin", "--prompt", PROMPT)
SERVED_WITHOUT_ARMS = ("llama.cpp", "transformers-serve")


def measure(name: str, out: Path, more: list[str], *, tiny: bool) -> bool:
    """Measure into a folder of ``out``, of which only the files to commit stay.

    Returns whether the run measured, and its invariant arm passed where it has one.
    """
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    options = [*RUNS[name], *more]
    if tiny:
        options = [*TINY_MODEL, *(word for option in TINY.items() for word in option)]
    arguments = ["run", *options, "--out", str(folder), "--plots", "--quiet"]
    print(f"== {name}: ndcheck {' '.join(arguments)}", flush=True)
    started_s = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "ndcheck", *arguments], cwd=ROOT, check=False)
    keep_files(folder)
    print(f"exit code {done.returncode} after {time.monotonic() - started_s:.0f} s", flush=True)
    verdicts = {row["arm"]: row["verdict"] for row in rows_of(folder / "summary.csv")}
    print(f"{name}: {verdicts}", flush=True)
    passed = name in SERVED_WITHOUT_ARMS or verdicts.get("invariant") == "PASS"
    return done.returncode in FINISHED and passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("part", choices=(*RUNS, "summary"))
    parser.add_argument("--tiny", action="store_true", help="the embedded model, in seconds")
    options, more = parser.parse_known_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.part == "summary":
        summarise(out, list(RUNS))
        return 0
    return 0 if measure(options.part, out, more, tiny=options.tiny) else 1


if __name__ == "__main__":
    sys.exit(main())
