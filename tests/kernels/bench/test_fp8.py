"""The script of the FP8 figures, on small shapes: a mixture's steps are written, all parts run."""

import csv

import pytest
import torch

from bench.fp8 import measure


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form")
def test_the_script_measures_a_small_mixture(tmp_path, capsys):
    measure.measure_steps(tmp_path, "tiny-moe-fp8", (1, 2))
    with (tmp_path / "decode-tiny-moe-fp8.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["batch"] for row in rows] == ["1", "2"]
    assert all(float(row["invariant_ms"]) > float(row["floor_ms"]) > 0 for row in rows)
    assert all(1 <= float(row["experts"]) <= 8 for row in rows)
