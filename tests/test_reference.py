"""The script of the reference experiment, on small models: what it leaves, and what it says."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path

import pytest

from bench.reference.summary import measured_table

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_script(warm_python):
    def run(name, *arguments):
        kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.run(
            [warm_python(), "-m", f"bench.reference.{name}", *map(str, arguments)],
            cwd=ROOT, env={**kept, "PYTHONPATH": "kernels"}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    return run


def test_a_part_leaves_its_tables_and_plots_and_the_summary_shows_them(run_script, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "README.md").write_text(
        "before\n<!-- measured -->\n<!-- end of measured -->\nafter"
    )
    done = run_script("experiment", tmp_path, "--part", "8b-long", "--tiny", "--summary")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "8b-long"
    assert sorted(path.name for path in folder.iterdir()) == [
        "completions.csv", "first-divergence.png", "loads.csv", "properties.csv", "report.md",
        "run.json", "samples.csv", "summary.csv", "unique-completions.png",
    ]  # fmt: skip
    with (folder / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["arm"], row["verdict"], row["n_samples"], row["n_unique"]) == (
        "invariant", "PASS", "15", "1",
    )  # fmt: skip
    with (folder / "samples.csv").open(newline="") as file:
        samples = list(csv.DictReader(file))
    assert len(samples) == 15
    assert "text" not in samples[0]
    assert json.loads((folder / "run.json").read_text())["spec"]["random_weights"] == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after")
    assert "| [8b-long](8b-long/report.md) | invariant | 1 of 15 | 15 | none |" in readme


def test_the_summary_shows_where_an_arm_left_its_reference(tmp_path):
    def write(name: str, *rows: dict[str, object]) -> None:
        with (tmp_path / "x" / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    (tmp_path / "x").mkdir()
    loads = {"arm": "stock", "axis": "batch-size", "first_divergence_min": 7, "elapsed_s": 1.5}
    write(
        "loads.csv",
        {**loads, "axis": "reference", "first_divergence_min": "", "elapsed_s": 100},
        loads,
        {**loads, "first_divergence_min": 4, "elapsed_s": 2},
        {**loads, "arm": "invariant", "first_divergence_min": 0},
    )
    write(
        "summary.csv",
        {
            "arm": "stock", "n_unique": 3, "n_samples": 9, "modal_count": 6, "verdict": "FAIL",
            "diverged_trials": 2, "n_trials": 2, "slowdown_vs_stock": "",
        },
    )  # fmt: skip
    runs = {"x": {"environment": {"model": {}}}}
    assert measured_table(tmp_path, runs).splitlines()[-1] == (
        "| [x](x/report.md) | stock | 3 of 9 | 6 | token 5 | 2 of 2 | FAIL | 3.5 |  |"
    )


def test_a_run_of_the_assistant_leaves_its_row(run_script, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "README.md").write_text("<!-- measured -->\n<!-- end of measured -->\n")
    for part in (("cpu", "--tiny"), ("summary",)):
        done = run_script("assistant", tmp_path, *part)
        assert "Traceback" not in done.stderr
    with (tmp_path / "cpu" / "summary.csv").open(newline="") as file:
        arms = {row["arm"]: row for row in csv.DictReader(file)}
    assert set(arms) == {"stock", "invariant"}
    readme = (tmp_path / "README.md").read_text()
    for arm, row in arms.items():
        unique = f"{row['n_unique']} of {row['n_samples']}"
        assert f"| [cpu](cpu/report.md) | {arm} | {unique} |" in readme
    assert "![cpu: unique completions by batch size](cpu/unique-completions.png)" in readme
