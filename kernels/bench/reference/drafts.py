"""Speculative decoding with a draft on one GPU: both arms of an 8B shape and of a trained model.

    PYTHONPATH=kernels python -m bench.reference.drafts results/drafts --smollm2 FILE_OR_DIRECTORY

The draft is the model's own first layers, all but a few, so that some of what it proposes is
accepted: random weights have no better one. Each model goes through `ndcheck run --draft`, which
leaves its tables in a folder of OUT; the 8B shape comes first. Without ``--smollm2`` that model is
left out. ``--tiny`` runs the same on a small model, on any machine.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.reference.experiment import Measurement, run

OPTIONS = {
    "--axes": "width",
    "--widths": "2,4,8,16",
    "--loads": "1,8",
    "-n": "80",
    "--max-tokens": "64",
}
MODELS = (
    Measurement("8b", "qwen3-8b", {**OPTIONS, "--draft": "layers:34"}, 300),
    Measurement("smollm2", None, {**OPTIONS, "--draft": "layers:28"}, 200),
)
COLUMNS = (
    *("arm", "verdict", "draft_proposed", "draft_accepted", "mean_accepted_length"),
    *("fed_tokens", "fed_other_tokens", "fed_other_bits", "width_classes_json"),
)


def tabulate(out: Path) -> Iterator[dict[str, str]]:
    """What every finished run says of the property, and its reasons."""
    for model in MODELS:
        path = out / model.folder / "properties.csv"
        if not path.is_file():
            continue
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["property"] == "width":
                    cells = {name: row[name] for name in COLUMNS}
                    yield {"model": model.folder, **cells, "reasons": row["reasons_json"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--smollm2", metavar="MODEL", help="a directory or a GGUF file of it")
    names = [model.folder for model in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    options = parser.parse_args()
    out, passed = options.out.resolve(), True
    out.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        is_missing = model.shape is None and options.smollm2 is None
        if is_missing or model.folder not in options.models:
            continue
        if options.tiny:
            model = dataclasses.replace(model, options={**model.options, "--draft": "layers:1"})
        started_s = time.monotonic()
        source = None if options.smollm2 is None else Path(options.smollm2)
        passed &= run(model, out, source, tiny=options.tiny)
        rows = list(tabulate(out))
        with (out / "drafts.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ("model", *COLUMNS, "reasons"))
            writer.writeheader()
            writer.writerows(rows)
        for row in rows:
            print(", ".join(row.values()), flush=True)
        print(f"{model.folder}: {time.monotonic() - started_s:.0f} s", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
