"""The script of the GPU tables, on small shapes: what it writes, and that it is not empty."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "explain.py"


def test_it_writes_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), "--tiny"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    tables = {}
    for file in tmp_path.glob("*.csv"):
        with file.open(newline="") as lines:
            tables[file.stem] = list(csv.DictReader(lines))
    assert {row["m"] for row in tables["order"]} == {"1", "2", "4"}
    assert all(len(row["digests"].split()[0]) == 16 for row in tables["order"])
    assert {row["evidence"] for row in tables["order"]} == {"confirmed"}
    assert len(tables["within_batch"]) >= 3
    assert {row["kv_length"] for row in tables["attention"]} == {"8", "16"}
    steps = json.loads((tmp_path / "introducers.json").read_text())["steps"]
    assert [step["step"] for step in steps] == [0, 1]
    assert all(sum(step["counts"].values()) > 100 for step in steps)
    assert len(list(tmp_path.iterdir())) <= 8
