"""The script of the 4-bit figures, on small shapes: a model's steps are written."""

import csv

import pytest
import torch

from bench.weight_only import measure


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form")
def test_the_script_measures_a_small_model(tmp_path):
    measure.measure_steps(tmp_path, "tiny-w4a16", (1, 2))
    with (tmp_path / "decode-tiny-w4a16.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["batch"] for row in rows] == ["1", "2"]
    assert all(float(row["invariant_ms"]) > float(row["floor_ms"]) > 0 for row in rows)
