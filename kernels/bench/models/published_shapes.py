"""A verdict on models of published shapes with random weights.

    PYTHONPATH=kernels python -m bench.models.published_shapes OUT

Each runs as a user would run it, `ndcheck run --random-weights 0` in a process of its own; OUT gets
one line a model: its verdicts by arm and property, or the line that refused it. Takes a GPU with
40 GiB; `--shapes tiny tiny-moe --device cpu` tries the script.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ndcheck import environment

SHAPES = Path(__file__).parents[1] / "shapes"
KEYS = ("verdict", "reasons", "n_trials", "n_samples", "n_errors", "n_unique", "axes")
PUBLISHED = ("qwen1.5-moe-a2.7b", "olmoe-1b-7b", "stablelm-2-1.6b", "qwen2-7b")


def measure(shape: str, device: str, extra: list[str]) -> dict[str, Any]:
    """What one `ndcheck run` said, and how long the process took in seconds."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "ndcheck", "run", "--json", "--random-weights", "0"]
        command += ["--model", str(SHAPES / shape), "--device", device, "--out", f"{out}/run"]
        started = time.perf_counter()
        run = subprocess.run(command + extra, capture_output=True, text=True, check=False)
        row: dict[str, Any] = {"shape": shape, "exit_code": run.returncode}
        row["elapsed_s"] = round(time.perf_counter() - started, 1)
        # A refusal writes nothing to stdout.
        result = json.loads(run.stdout) if run.stdout else {"verdict": None, "probes": []}
        row["verdict"] = result["verdict"]
        row["arms"] = {p["arm"]: {key: p[key] for key in KEYS} for p in result["probes"]}
        row["last_line"] = (run.stderr.strip().splitlines() or [""])[-1]
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(PUBLISHED))
    parser.add_argument("--device", default="cuda")
    options, extra = parser.parse_known_args()
    here = environment.capture({})
    rows = []
    for shape in options.shapes:
        rows.append(measure(shape, options.device, extra))
        about = {"hardware": here.hardware, "software": here.software, "arguments": extra}
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        print(
            shape, rows[-1]["exit_code"], rows[-1]["elapsed_s"], rows[-1]["last_line"], flush=True
        )


if __name__ == "__main__":
    main()
