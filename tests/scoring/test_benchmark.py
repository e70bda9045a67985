"""The script of the GPU table, on a tiny shape: what it writes, and that its controls end it."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from bench.engines import scored


def test_it_writes_its_table_and_its_controls_count(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scored", str(tmp_path), "--tiny"])
    monkeypatch.setattr(scored, "PROBES", scored.PROBES[:2])
    assert scored.main() == 0, capsys.readouterr().out
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {row["control"] for row in rows} == {"caught"}
    by_pair = {(row["recorded_by"], row["scored_by"]): int(row["n_differ"]) for row in rows}
    assert by_pair["ndcheck invariant", "ndcheck invariant"] == 0
    assert by_pair["ndcheck invariant", "fp32"] > 0
    for line in (tmp_path / "ndcheck-stock.jsonl").read_text().splitlines():
        assert len(json.loads(line)["completion_ids"]) == scored.N_TOKENS
    assert json.loads((tmp_path / "environment.json").read_text())["software"]["torch"]


def test_an_arm_that_scores_its_own_tokens_otherwise_fails_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scored", str(tmp_path), "--tiny"])
    monkeypatch.setattr(scored, "PROBES", scored.PROBES[:1])
    compare = scored.compare
    monkeypatch.setattr(
        scored, "compare", lambda completions, found: compare(completions, scored.planted(found))
    )
    assert scored.main() == 1
    assert "scores 1 of its own tokens with other bits" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """Drawing is tested where the command draws."""

    def refuse(*arguments):
        raise ImportError

    monkeypatch.setattr(scored.figure, "draw", refuse)
