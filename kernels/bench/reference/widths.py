"""The same tokens in passes of several, and scored, on one GPU: both arms of three models.

    PYTHONPATH=kernels python -m bench.reference.widths results/widths --smollm2 FILE_OR_DIRECTORY

Each model goes through `ndcheck run --axes width,scoring`, which leaves its tables in a folder of
OUT, the 8B shape first; then `ndcheck trace` says of the 8B shape which op follows the width.
Without ``--smollm2`` that model is left out. ``--tiny`` runs the same on small models, on any
machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.reference.experiment import PROMPT, ROOT, SHAPES, TINY_SHAPES, Measurement, run

OPTIONS = {
    "--axes": "width,scoring",
    "--loads": "1,208",
    "-n": "2508",  # Every width and cut of one batch of each size.
    "--max-tokens": "80",
}
MODELS = (
    Measurement("8b", "qwen3-8b", OPTIONS, 200),
    Measurement("smollm2", None, {**OPTIONS, "--chat": "", "--max-tokens": "200"}, 300),
    Measurement("moe", "qwen3-30b-a3b", OPTIONS, 240),
)
STEP = 33
"""Traced: in the last column of a pass of every width, so that all the pass may weigh on it."""
COLUMNS = ("model", "arm", "property", "verdict", "tokens", "other tokens", "other bits", "classes")


def tabulate(out: Path) -> Iterator[dict[str, str]]:
    """What every finished run says of both properties."""
    for model in MODELS:
        path = out / model.folder / "properties.csv"
        if not path.is_file():
            continue
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["fed_tokens"]:
                    names = ("arm", "property", "verdict", "fed_tokens", "fed_other_tokens")
                    cells = (*(row[n] for n in names), row["fed_other_bits"])
                    classes = row["width_classes_json"] * (row["property"] == "width")
                    yield dict(zip(COLUMNS, (model.folder, *cells, classes), strict=True))


def write_table(out: Path) -> None:
    rows = list(tabulate(out))
    with (out / "widths.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(", ".join(row.values()), flush=True)


def trace(out: Path, *, tiny: bool) -> None:
    """Which op of the 8B shape gives other bits at which width."""
    shape = TINY_SHAPES["qwen3-8b"] if tiny else "qwen3-8b"
    command = [
        *(sys.executable, "-m", "ndcheck", "trace", "--model", f"{SHAPES}/{shape}"),
        *("--random-weights", "0", "--prompt", PROMPT, "--loads", "1", "--step", str(STEP)),
        *("--widths", "2,3,4,5,8,16,32", "--no-swaps", "--json", "--quiet"),
        *(("--device", "cpu") if tiny else ()),
    ]
    done = subprocess.run(command, cwd=ROOT, check=True, timeout=300, stdout=subprocess.PIPE)
    document = json.loads(done.stdout)
    for step in document["steps"]:
        del step["loads"]  # Every op of every layer: its groups say the same in short.
        for group in step["groups"]:
            print(group["op"], group["where"], group["bit_classes"], flush=True)
    text = json.dumps(document, indent=1)
    (out / "8b-ops.json").write_text(f"{text}\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--smollm2", metavar="MODEL", help="a directory or a GGUF file of it")
    names = [model.folder for model in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    options = parser.parse_args()
    out, passed = options.out.resolve(), True
    out.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        is_missing = model.shape is None and options.smollm2 is None
        if is_missing or model.folder not in options.models:
            continue
        started_s = time.monotonic()
        source = None if options.smollm2 is None else Path(options.smollm2)
        passed &= run(model, out, source, tiny=options.tiny)
        write_table(out)
        print(f"{model.folder}: {time.monotonic() - started_s:.0f} s", flush=True)
    if "8b" in options.models:
        trace(out, tiny=options.tiny)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
