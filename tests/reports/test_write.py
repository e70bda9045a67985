from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest

from ndcheck.errors import BackendError
from ndcheck.records import RunSpec
from ndcheck.reports import plots, write
from ndcheck.request import DEFAULTS, make_probes

EXAMPLES = [
    "failing",
    "two_arms",
    "passing",
    "inconclusive",
    "empty",
    "all_errors",
    "many",
    "hostile",
]


def write_reports(path, example):
    return write.write_reports(replace(example, directory=path), DEFAULTS, html=True)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_second_rendering_is_byte_identical(name, tmp_path, request) -> None:
    example = request.getfixturevalue(name)
    first = {path.name: path.read_bytes() for path in write_reports(tmp_path, example)}
    again = {path.name: path.read_bytes() for path in write_reports(tmp_path, example)}
    assert first == again
    assert {path.name for path in tmp_path.iterdir()} == set(first)
    assert set(first) - {"prompts.jsonl"} == {
        "report.html",
        "report.md",
        "samples.csv",
        "completions.csv",
        "loads.csv",
        "properties.csv",
        "summary.csv",
    }
    assert all(str(tmp_path).encode() not in content for content in first.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_csv_files_are_rfc_4180(name, tmp_path, request) -> None:
    for path in write_reports(tmp_path, request.getfixturevalue(name)):
        if path.suffix != ".csv":
            continue
        text = path.read_bytes().decode("utf-8")
        assert text.endswith("\r\n")
        rows = list(csv.reader(text.splitlines(keepends=True), strict=True))
        assert {len(row) for row in rows} == {len(rows[0])}
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        assert frame.to_numpy().tolist() == rows[1:]


def test_samples_csv_reads_back_as_it_was(two_arms, tmp_path) -> None:
    write_reports(tmp_path, two_arms)
    frame = pd.read_csv(tmp_path / "samples.csv")
    assert len(frame) == 400
    assert frame["text"].tolist() == [sample.text for sample in two_arms.samples]
    assert frame["achieved_batch_size"].tolist() == [3] * 400


def test_hostile_text_comes_back_as_text(hostile, tmp_path) -> None:
    write_reports(tmp_path, hostile)
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(byte in content for byte in (b"\x1b", b"\0", "\u202e".encode()))
    with (tmp_path / "completions.csv").open(encoding="utf-8", newline="") as file:
        tokens = [row["reference_token"] for row in csv.DictReader(file)]
    assert tokens == ["", "'=1+1", "'=1+1"] * 2


def test_prompts_that_no_option_can_hold_are_written_for_the_command(hostile, tmp_path) -> None:
    paths = write_reports(tmp_path, hostile)
    assert tmp_path / "prompts.jsonl" in paths
    assert make_probes([], tmp_path / "prompts.jsonl") == hostile.run.spec.probes


def test_files_are_replaced_whole_or_not_at_all(passing, tmp_path, monkeypatch) -> None:
    write_reports(tmp_path, passing)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_csv", fail)
    with pytest.raises(BackendError, match="No space left"):
        write_reports(tmp_path, passing)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_samples_that_do_not_fit_the_summary_are_refused(passing, tmp_path) -> None:
    with pytest.raises(ValueError, match="zip"):
        write_reports(tmp_path, replace(passing, samples=passing.samples[1:]))


def test_the_command_is_the_runs_and_not_the_machines(failing, tmp_path) -> None:
    spec: RunSpec = failing.run.spec
    write_reports(tmp_path, failing)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert spec.arms == ("stock",)
    assert "ndcheck run --loads 1,2,4,8,16,32 -n 1000 --kernels stock" in report
    assert json.dumps(str(tmp_path)) not in report


def test_pages_and_plots_are_written_only_where_asked_for(two_arms, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plots, "PLOTS", {"cost": plots.PLOTS["cost"]})
    there = replace(two_arms, directory=tmp_path)
    paths = write.write_reports(there, DEFAULTS)
    assert {path.suffix for path in paths} == {".md", ".csv"}
    paths = write.write_reports(there, DEFAULTS, plots=True)
    pictures = [path for path in paths if path.suffix in (".png", ".svg")]
    assert {path.name for path in pictures} == {"cost.png", "cost.svg"}
    assert sorted(pictures) == sorted((tmp_path / "plots").iterdir())
    assert not (tmp_path / "report.html").exists()


def test_pandas_is_not_imported_before_a_table_is_made() -> None:
    modules = "ndcheck.reports.terminal, ndcheck.reports.write, ndcheck.reports.document"
    check = f"import sys, {modules}; print('pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
