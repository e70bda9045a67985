"""`ndcheck kernels` as a user has it: exit codes, screens, CSV, bad input."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from ndcheck_kernels.measure import cases

SMALL = ("--device", "cpu", "--rows", "1,2,17")


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_check_shows_and_writes_what_it_found(ndcheck_here, tmp_path):
    done = ndcheck_here("kernels", "check", *SMALL, "--op", "linear,softmax", "--csv", "bits.csv")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split()[:3] == ["op", "shape", "dtype"]
    assert "PASS  9 of 9 have one bit class" in done.stdout
    rows = read(tmp_path / "bits.csv")
    assert len(rows) == 9 * 3
    assert {row["m"] for row in rows} == {"1", "2", "17"}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float16", "float32"}
    assert all(float(row["error"]) <= float(row["budget"]) for row in rows)
    assert all(row["classes"] == "1" and int(row["control_classes"]) > 1 for row in rows)
    assert {row["stock_same_bits"] for row in rows} <= {"True", "False"}


def test_check_as_json_has_the_same_numbers_as_csv(ndcheck_here, tmp_path):
    options = ("--op", "sum", "--dtype", "bf16", "--csv", "bits.csv", "--json")
    done = ndcheck_here("kernels", "check", *SMALL, *options)
    (finding,) = json.loads(done.stdout)["findings"]
    rows = read(tmp_path / "bits.csv")
    assert [float(row["error"]) for row in rows] == [c["error"] for c in finding["row_counts"]]
    assert (finding["op"], finding["outcome"], finding["kernel"]) == ("sum", "PASS", "invariant")


@pytest.mark.parametrize(
    ("fault", "code", "verdict", "reason"),
    [
        ("fails", 1, "FAIL", "bit classes: a row has other bits in a batch of 17"),
        ("control", 3, "INCONCLUSIVE", "the planted fault was not caught"),
    ],
)
def test_a_planted_fault_decides_the_exit_code(
    ndcheck_here, tmp_path, monkeypatch, fault, code, verdict, reason
):
    linear = next(case for case in cases.checked_cases("cpu") if case.op == "linear")
    faults = {
        "fails": {"call": lambda x, *o: linear.grouped(1 + 2 * (len(x) // 17), x, *o)},
        "control": {"grouped": lambda groups, *o: linear.call(*o)},
    }
    planted = (replace(linear, **faults[fault]),)
    monkeypatch.setattr(cases, "checked_cases", lambda device: planted)
    done = ndcheck_here("kernels", "check", *SMALL, "--dtype", "fp32", "--csv", "bits.csv")
    assert done.returncode == code, done.stderr
    assert f"\n{verdict}  0 of 1" in done.stdout
    assert reason in " ".join(done.stdout.split())
    assert "ndcheck kernels check --op linear --dtype fp32" in done.stdout
    assert {row["outcome"] for row in read(tmp_path / "bits.csv")} == {verdict}


def test_bench_shows_and_writes_what_it_timed(ndcheck_here, tmp_path):
    options = ("--op", "linear,rms_norm", "--csv", "time.csv")
    done = ndcheck_here("kernels", "bench", "--device", "cpu", "--rows", "1,2", *options)
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert "geometric mean of 4 cells" in done.stdout
    assert "ceilings bf16: copy" in done.stdout
    rows = read(tmp_path / "time.csv")
    assert [(row["op"], row["m"]) for row in rows] == [
        ("linear", "1"), ("linear", "2"), ("rms_norm", "1"), ("rms_norm", "2"),
    ]  # fmt: skip
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(float(row["stock_us"]) / float(row["us"]))
        assert (row["tflop_per_s"] == "") == (row["op"] == "rms_norm")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--op", "conv2d"), ("'conv2d'", "linear")),
        (("--dtype", "int8"), ("'int8'", "bf16, fp16, fp32")),
        (("--rows", "0"), ("'0'", "1 to")),
        (("--rows", ","), ("--rows",)),
        (("--device", "tpu"), ("tpu",)),
        (("--device", "meta"), ("meta is not available",)),
        (("--csv", "missing/file.csv"), ("missing/file.csv",)),
    ],
)
def test_bad_input_is_one_line(ndcheck_here, tmp_path, options, parts):
    done = ndcheck_here("kernels", "check", "--op", "sum", *options)
    assert done.returncode == (4 if "--csv" in options else 2), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("ndcheck: ")
    assert all(part in line for part in parts)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
