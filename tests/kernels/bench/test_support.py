"""The maker of the support table: what it keeps as it goes, and what a failing family costs."""

import json
import multiprocessing
import multiprocessing.spawn

import pytest

from bench.models import support

AXES = ("run-to-run",)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Where results go, and a README that has nothing but the table's place."""
    monkeypatch.setattr(support, "RESULTS", tmp_path / "families")
    monkeypatch.setattr(support, "README", tmp_path / "README.md")
    support.README.write_text("<!-- support table -->\n<!-- end -->\n")
    return support.RESULTS / "cpu.json"


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["support", "--quick", "--axes", *AXES, *arguments])
    return support.main()


@pytest.fixture
def warm_processes(monkeypatch, warm_python):
    before = multiprocessing.spawn.get_executable()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    multiprocessing.set_executable(warm_python())
    yield
    multiprocessing.set_executable(before)


def test_rows_of_several_processes_are_those_of_one(results, warm_processes, monkeypatch):
    assert run(monkeypatch, "--jobs", "2", "--families", "GPT-2", "OPT") == 0
    rows = json.loads(results.read_text())["rows"]
    assert [(row["family"], row["dtype"]) for row in rows] == [
        *(("GPT-2", "bf16"), ("GPT-2", "fp32"), ("OPT", "bf16"), ("OPT", "fp32"))
    ]
    here = support.measure_row("cpu", support.QUICK, AXES, ("OPT", "fp32"))
    assert rows[-1] == here
    assert "| OPT | cpu | bf16, fp32 | pass (0/" in support.README.read_text()


def test_a_family_that_fails_costs_no_other(results, monkeypatch, capsys):
    own = support.measure

    def fail(family, *arguments):
        if family == "GPT-2":
            raise RuntimeError("out of memory")
        return own(family, *arguments)

    monkeypatch.setattr(support, "measure", fail)
    assert run(monkeypatch, "--families", "GPT-2", "OPT") == 1
    rows = json.loads(results.read_text())["rows"]
    assert [row["family"] for row in rows] == ["OPT", "OPT"]
    assert "GPT-2 bf16: stock: RuntimeError: out of memory" in capsys.readouterr().out
