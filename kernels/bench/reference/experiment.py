"""The reference experiment on one GPU: 1000 completions of one prompt under varying batches.

    PYTHONPATH=kernels python -m bench.reference.experiment results/reference --part 8b-long
    PYTHONPATH=kernels python -m bench.reference.experiment results/reference --summary

Run from the repository's root. Each part runs `ndcheck run` and leaves its tables and two plots in
a folder of OUT as it goes. ``--summary`` draws the decode steps and writes the tables of OUT's
README.md from what is committed. ``--tiny`` runs the same on small models, on any machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.reference.summary import summarise
from bench.table import rows_of

ROOT = Path(__file__).parents[3]
SHAPES = "kernels/bench/shapes"
PROMPT = "Tell me about Richard Feynman"
POWERS = "1,2,4,8,16,32,64,128,256,512"
RUN_FILES = (
    *("run.json", "report.md", "summary.csv", "properties.csv"),
    *("loads.csv", "completions.csv", "samples.csv"),
)
PLOTS = ("unique-completions.png", "first-divergence.png")
GRACE_S = 90
"""What an interrupted run gets to write the reports of what it has."""
FINISHED = (0, 1, 3)
"""Exit codes of a run that measured: pass, nondeterminism, inconclusive."""
TINY = {"--loads": "1,4", "-n": "15", "--max-tokens": "8", "--device": "cpu"}
TRAINED_MODEL = Path(tempfile.gettempdir()) / "ndcheck-trained"
TINY_SHAPES = {"qwen3-8b": "tiny", "qwen3-30b-a3b": "tiny-moe"}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One `ndcheck run`: the folder for it, the shape with random weights or None for the trained
    model, its options (flags with an empty value), and how many seconds it may take.
    """

    folder: str
    shape: str | None
    options: dict[str, str]
    budget_s: int

    def command(self, model: Path | None, *, tiny: bool) -> list[str]:
        """The arguments of `ndcheck`, but for where to write."""
        arguments = ["run"]
        if self.shape is None:
            arguments += ["--model", str(model)]
        else:
            shape = TINY_SHAPES[self.shape] if tiny else self.shape
            arguments += ["--model", f"{SHAPES}/{shape}", "--random-weights", "0"]
        options = {"--prompt": PROMPT, **self.options, **(TINY if tiny else {})}
        return arguments + [word for option in options.items() for word in option if word]


PARTS = {
    "8b-long": (
        Measurement(
            "8b-long",
            "qwen3-8b",
            {
                "--kernels": "invariant",
                "--axes": "batch-size",
                "--loads": "500",
                "-n": "1000",
                "--max-tokens": "1000",
            },
            180,
        ),
    ),
    "8b-grid": (
        Measurement(
            "8b-copies",
            "qwen3-8b",
            {"--axes": "batch-size", "--loads": POWERS, "-n": "1000", "--max-tokens": "150"},
            150,
        ),
        Measurement(
            "8b-mixed",
            "qwen3-8b",
            {"--mode": "mixed", "--loads": "1,32", "-n": "15", "--max-tokens": "100"},
            90,
        ),
    ),
    "moe": (
        Measurement(
            "moe-invariant",
            "qwen3-30b-a3b",
            {
                "--kernels": "invariant",
                "--axes": "batch-size",
                "--loads": POWERS,
                "-n": "1000",
                "--max-tokens": "128",
            },
            120,
        ),
        Measurement(
            "moe-both",
            "qwen3-30b-a3b",
            {"--axes": "batch-size", "--loads": "1,4,16,64", "-n": "85", "--max-tokens": "100"},
            90,
        ),
    ),
    "trained": (
        Measurement(
            "trained-copies",
            None,
            {
                "--axes": "run-to-run,batch-size",
                "--loads": "1,2,4,8,16,32,64,128,256",
                "-n": "1000",
                "--max-tokens": "400",
            },
            150,
        ),
        Measurement(
            "trained-mixed",
            None,
            {"--mode": "mixed", "--loads": "1,8,64", "-n": "26", "--max-tokens": "200"},
            90,
        ),
    ),
}


def run(measurement: Measurement, out: Path, model: Path | None, *, tiny: bool) -> bool:
    """Measure into a folder of ``out``, of which only the files to commit stay.

    Returns whether the run measured and its invariant arm passed.
    """
    folder = out / measurement.folder
    shutil.rmtree(folder, ignore_errors=True)
    arguments = measurement.command(model, tiny=tiny)
    print(f"\n== {measurement.folder}: ndcheck {' '.join(arguments)}", flush=True)
    started_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "ndcheck", *arguments, "--out", str(folder), "--plots", "--quiet"],
        cwd=ROOT,
    )
    try:
        code = process.wait(measurement.budget_s)
    except subprocess.TimeoutExpired:
        print(f"out of time: interrupted after {measurement.budget_s} s", flush=True)
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    keep_files(folder)
    print(f"exit code {code} after {time.monotonic() - started_s:.0f} s", flush=True)
    verdicts = {row["arm"]: row["verdict"] for row in rows_of(folder / "summary.csv")}
    print(f"{measurement.folder}: {verdicts}", flush=True)
    return code in FINISHED and verdicts.get("invariant") == "PASS"


def keep_files(folder: Path) -> None:
    """Leave the tables and PLOTS; a sample's text is in completions.csv, by completion_id."""
    for name in PLOTS:
        if (folder / "plots" / name).is_file():
            (folder / "plots" / name).replace(folder / name)
    shutil.rmtree(folder / "plots", ignore_errors=True)
    samples = rows_of(folder / "samples.csv")
    if samples:
        write_rows(
            folder / "samples.csv", [{k: v for k, v in s.items() if k != "text"} for s in samples]
        )
    # Without its tables a run that was killed can still be reported or resumed.
    if (folder / "summary.csv").is_file():
        for path in folder.iterdir():
            if path.name not in (*RUN_FILES, *PLOTS):
                path.unlink()


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def decode_steps(out: Path, *, tiny: bool) -> bool:
    """The decode step of the mixture of experts, by batch size."""
    shape, batches = ("tiny-moe", "1,4") if tiny else ("qwen3-30b-a3b", "1,64,256")
    command = [sys.executable, "-m", "bench.models.decode", str(out / "moe-decode")]
    command += ["--shape", shape]
    print(f"\n== moe-decode: {' '.join(command[1:])}", flush=True)
    done = subprocess.run([*command, "--batches", batches], cwd=ROOT, check=False, timeout=180)
    return done.returncode == 0


def run_part(part: str, out: Path, train_s: float, *, tiny: bool) -> bool:
    """Whether all of the part's runs measured what they should."""
    model = None
    if part == "trained":
        from bench.reference.training import train

        model = TRAINED_MODEL
        training = json.dumps(train(model, train_s, tiny=tiny), indent=2)
        (out / "trained").mkdir(exist_ok=True)
        (out / "trained" / "training.json").write_text(f"{training}\n", encoding="utf-8")
    passed = [run(m, out, model, tiny=tiny) for m in PARTS[part]]
    if part == "moe":
        passed.append(decode_steps(out, tiny=tiny))
    return all(passed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be given several times")
    parser.add_argument("--train-seconds", type=float, default=150, metavar="S")
    parser.add_argument("--summary", action="store_true", help="write OUT/README.md's tables")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU, in seconds")
    options = parser.parse_args()
    if not options.part and not options.summary:
        parser.error(f"nothing to do: give --part ({', '.join(PARTS)}) or --summary")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    passed = [
        run_part(part, out, options.train_seconds, tiny=options.tiny) for part in options.part or ()
    ]
    if options.summary:
        summarise(out, [m.folder for part in PARTS.values() for m in part])
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
