"""The search for ops that do not repeat, on a CPU, where none does; its control is caught."""

from __future__ import annotations

import csv

import pytest

from bench.stack import run_to_run


def test_the_planted_op_is_caught_and_no_other(tmp_path, capsys):
    run_to_run.main(tmp_path, tiny=True)
    said = capsys.readouterr().out
    assert "seen to differ: silu\n" in said
    assert "ops with other bits: 0" in said
    rows = list(csv.DictReader((tmp_path / "ops.csv").read_text().splitlines()))
    assert sum(int(row["calls"]) for row in rows) > 100
    assert {row["op"] for row in rows} >= {"linear", "silu", "scaled_dot_product_attention"}
    decodes = {
        r["backend"]: r for r in csv.DictReader((tmp_path / "decodes.csv").read_text().splitlines())
    }
    assert decodes["default"]["keys_at_first"] == decodes["math"]["keys_at_first"] == "never"


def test_a_control_that_is_missed_ends_it(monkeypatch):
    monkeypatch.setattr(run_to_run.Twice, "__init__", lambda self, planted="": blind(self))
    with pytest.raises(SystemExit, match="was not seen to differ"):
        run_to_run.control(run_to_run.model_of("cpu", 1))


def blind(mode):
    super(run_to_run.Twice, mode).__init__()
    mode.planted, mode.seen = "", {}
