"""The script of the GPU tables, on small shapes: what it writes, and that it is not empty."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import torch

from bench.measurement import explain


def test_it_writes_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["explain", str(tmp_path), "--tiny"])
    with pytest.raises(SystemExit) as ended:
        explain.main()
    assert ended.value.code == 0, capsys.readouterr().err
    tables = {}
    for file in tmp_path.glob("*.csv"):
        with file.open(newline="") as lines:
            tables[file.stem] = list(csv.DictReader(lines))
    assert {row["m"] for row in tables["order"]} == {"1", "2", "4"}
    assert all(len(row["digests"].split()[0]) == 16 for row in tables["order"])
    assert {row["evidence"] for row in tables["order"]} == {"confirmed"}
    assert 1 <= len(tables["within_batch"]) <= 12
    assert {row["kv_length"] for row in tables["attention"]} == {"8", "16"}
    steps = json.loads((tmp_path / "introducers.json").read_text())["steps"]
    assert [step["step"] for step in steps] == [0, 1]
    assert all(sum(step["counts"].values()) > 100 for step in steps)
    assert len(list(tmp_path.iterdir())) <= 8


def test_the_first_op_that_tells_rows_apart_is_named(tmp_path):
    class Uneven(torch.nn.Module):
        """Other bits in every row but the first, from the third decode step on."""

        def __init__(self, inner):
            super().__init__()
            self.inner, self.n_calls = inner, 0

        def forward(self, x):
            self.n_calls += 1
            out = self.inner(x)
            if self.n_calls < 4:
                return out
            return torch.cat([out[:1], torch.nextafter(out[1:], torch.full_like(out[1:], 9.0))])

    model = explain.RandomModel(explain.TINY, torch.device("cpu"))
    model.model.model.norm = Uneven(model.model.model.norm)
    explain.decode_copies(model, explain.SMALL, tmp_path)
    with (tmp_path / "within_batch.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["first_op"] for row in rows] == ["", "", "", "cat"]
    assert rows[-1]["module"] == "model.norm"
    assert rows[-1]["its_rows_unlike_row_0"] == "3"
    assert int(rows[-1]["kv_length"]) == 23
