"""`ndcheck.measure` and what it returns; the examples of the README and the docstrings run."""

from __future__ import annotations

import doctest
import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import ndcheck
from ndcheck import api, testing
from ndcheck.errors import UsageError

README = Path(__file__).parents[1] / "README.md"
SMALL = {"loads": [1, 4], "samples": 40, "max_tokens": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return ndcheck.measure("scripted:batch-dependent", out=out, **SMALL)


def test_verdict_and_command(run):
    assert run.verdict == "FAIL"
    (reason,) = run.reasons
    assert reason.startswith("batch-size: tokens diverged in 4 of 4 loads")
    assert run.command.startswith(
        "ndcheck run --model scripted:batch-dependent --loads 1,4 -n 40 --max-tokens 8"
    )
    assert run.record.status == "finished"


def test_progress(tmp_path):
    seen = []
    ndcheck.measure(
        "scripted:clean",
        out=tmp_path / "run",
        on_progress=lambda progress: seen.append((progress.n_done, progress.n_trials)),
        **SMALL,
    )
    assert seen == [(i, 37) for i in range(1, 38)]


def test_data_frames_are_the_csv_files(run):
    for name, frame in (
        ("samples", run.samples),
        ("completions", run.completions),
        ("loads", run.loads),
        ("summary", run.probes),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            file = pd.read_csv(run.path / f"{name}.csv")
        assert list(file.columns) == list(frame.columns)
        assert len(file) == len(frame) == len(set(frame.index))
        assert file.isna().equals(frame.replace("", None).isna())
    assert run.samples["completion_id"].value_counts().to_dict() == {1: 45, 2: 13}


def test_a_run_is_read_again(run):
    again = ndcheck.Run(run.path)
    assert again.judgement == run.judgement
    assert repr(again) == repr(run)
    with pytest.raises(UsageError, match="holds no run"):
        ndcheck.Run(run.path / "none")


def test_it_shows_the_screen(run):
    assert repr(run).startswith(f"<ndcheck.Run {str(run.path)!r} FAIL: 17 of 25 loads diverged")
    console = Console(file=io.StringIO(), width=80)
    console.print(run)
    screen = console.file.getvalue()
    assert screen.startswith("FAIL  17 of 25 loads diverged")
    assert "at token 4" in screen
    html = run._repr_html_()
    assert html.startswith("<pre")
    assert "17 of 25 loads diverged" in html


def test_hostile_completions_stay_text_in_a_notebook(tmp_path):
    run = ndcheck.measure("scripted:hostile", max_tokens=20, out=tmp_path / "run")
    html = run._repr_html_()
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert not {"\x1b", "\u202e"} & set(html)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loads": [0]}, "--loads: '0' is not a batch size"),
        ({"load": [1]}, "there is no option 'load', did you mean loads"),
        ({"axes": ["slots"]}, "--axes: 'slots' is unknown"),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        ndcheck.measure("scripted:clean", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1e3}, "--samples 1000.0: give a whole number"),
        ({"samples": "20"}, "--samples '20': give a whole number"),
        ({"temperature": "0"}, "--temperature '0': give a number"),
        ({"chat": 1}, "--chat 1: give True or False"),
        ({"loads": 4}, "--loads 4: give text or a list"),
        ({"prompt": b"x"}, "--prompt b'x': give text or a list"),
        ({"prompts_file": 3}, "--prompts-file 3: give a path"),
        ({"device": 0}, "--device 0: give text"),
        ({"axes": None}, "--axes None: give text or a list"),
        ({"samples": None}, "--samples None: give a whole number"),
    ],
)
def test_options_of_another_type_are_refused_before_anything_runs(
    tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(message)):
        ndcheck.measure("scripted:clean", **options)
    assert list(tmp_path.iterdir()) == []


def test_paths_may_be_text_and_numbers_numpys(tmp_path):
    (tmp_path / "prompts.txt").write_text("one prompt\n")
    run = ndcheck.measure(
        "scripted:clean",
        prompts_file=str(tmp_path / "prompts.txt"),
        samples=np.int64(24),
        max_tokens=np.int32(4),
        confidence=np.float32(0.75),
        loads=np.array([1, 2]),
        out=str(tmp_path / "run"),
    )
    assert run.verdict == "PASS"
    assert [probe.prompt for probe in run.record.spec.probes] == ["one prompt"]


def test_import_ndcheck_imports_nothing_heavy():
    code = (
        "import sys, ndcheck; ndcheck.__version__;"
        "print(*sorted(set(sys.modules) & {'torch', 'numpy', 'pandas', 'rich', 'ndcheck.api'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    with pytest.raises(AttributeError, match="no attribute 'mesure'"):
        ndcheck.mesure  # noqa: B018


@pytest.mark.parametrize("module", [api, testing])
def test_examples_of_the_docstrings(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(module)
    assert results.failed == 0
    assert results.attempted > 2


def test_example_of_the_readme(tmp_path):
    """In a process of its own, where torch is not imported yet, as in a notebook."""
    command = [sys.executable, "-m", "doctest", "-v", str(README)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
