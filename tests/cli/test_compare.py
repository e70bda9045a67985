"""`ndcheck compare` and `ndcheck runs`."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import ndcheck
from ndcheck.reports.listing import run_lines

FIVE = "run-to-run,batch-size,slot,neighbours,cache"
SMALL = {"loads": [1, 4], "samples": 40, "max_tokens": 8, "axes": FIVE}


@pytest.fixture(scope="module")
def measured_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    ndcheck.measure("scripted:clean", out=folder / "clean", **SMALL)
    ndcheck.measure("scripted:batch-dependent", out=folder / "forks", **SMALL)
    ndcheck.measure("scripted:clean", out=folder / "longer", **{**SMALL, "max_tokens": 12})
    ndcheck.measure("scripted:hostile", out=folder / "hostile", prompt="=1\x1b[31m", **SMALL)
    return folder


@pytest.fixture(autouse=True)
def folder(measured_runs, tmp_path):
    return shutil.copytree(measured_runs, tmp_path, dirs_exist_ok=True)


def test_equal_runs(ndcheck_here, folder):
    ndcheck.measure("scripted:clean", out=folder / "again", **SMALL)
    done = ndcheck_here("compare", "clean", "again", "--fail-on", "tokens,bits,unique,rate,load")
    assert done.returncode == 0, done.stderr
    assert "Made in the same way" in done.stdout
    assert "no drift: 8 tokens equal bit for bit" in done.stdout
    assert done.stdout.count("PASS") == 5


def test_a_run_and_itself_are_no_two_runs(ndcheck_here, folder):
    shutil.copytree(folder / "clean", folder / "copy")
    done = ndcheck_here("compare", "clean", "copy", "--fail-on", "tokens,load")
    assert done.returncode == 3, done.stderr
    assert "PASS" not in done.stdout
    assert " ".join(done.stdout.split()).count("nothing can drift") == 3
    shown = ndcheck_here("compare", "clean", "clean", "--json")
    assert shown.returncode == 0
    assert json.loads(shown.stdout)["is_of_one_run"] is True


@pytest.mark.parametrize(
    ("kinds", "code"),
    [(None, 0), ("tokens", 0), ("unique", 1), ("rate", 1), ("model", 1), ("kernels", 0)],
)
def test_fail_on(ndcheck_here, kinds, code):
    options = () if kinds is None else ("--fail-on", kinds)
    done = ndcheck_here("compare", "clean", "forks", *options)
    assert done.returncode == code, done.stderr
    assert re.search(r"unique +1 of 40 +2 of 40\n", done.stdout)
    assert "Fisher's exact test" in done.stdout
    assert re.search("scripted:clean +scripted:batch-dependent", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_tokens_that_end_earlier_drift(ndcheck_here):
    done = ndcheck_here("compare", "longer", "clean", "--fail-on", "tokens,load")
    assert done.returncode == 1
    assert re.search("TOKENS differ from token 9: '[a-z]+ ', now the end", done.stdout)


def test_nothing_to_compare_is_inconclusive(ndcheck_here):
    done = ndcheck_here("compare", "clean", "hostile", "--fail-on", "tokens")
    assert done.returncode == 3
    assert "share no prompt" in done.stdout
    assert "\x1b" not in done.stdout


def test_json(ndcheck_here):
    done = ndcheck_here("compare", "clean", "forks", "--json", "--fail-on", "unique")
    document = json.loads(done.stdout)
    (drift,) = document["drifts"]
    assert document["exit_code"] == 1 == done.returncode
    assert document["fail_on"]["unique"]["verdict"] == "FAIL"
    assert (drift["a"]["n_unique"], drift["b"]["n_unique"]) == (1, 2)
    assert {change["group"] for change in document["changes"]} == {"model"}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("clean", "none"), "none holds no run; saved baselines: none"),
        (("clean", "forks", "--fail-on", "token"), "'token' is unknown; choose from environment"),
        (("clean", "forks", "--confidence", "2"), "--confidence 2.0"),
        (("clean",), "'B'"),
    ],
)
def test_bad_input(ndcheck_here, options, part):
    done = ndcheck_here("compare", *options)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert part in line


def test_runs(ndcheck_here, folder):
    (folder / "forks" / "summary.csv").unlink()
    (folder / "hostile" / "run.json").write_text("{")
    (folder / "other").mkdir()
    done = ndcheck_here("runs", ".")
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()[2:]]
    assert {line[0] for line in lines[::2]} == {"clean", "forks", "longer"}
    rows = {run[0]: (run[1:], arm) for run, arm in zip(lines[::2], lines[1::2], strict=True)}
    assert rows["clean"] == (["scripted:clean"], ["stock", "PASS", "1", "0/23", "0/23"])
    assert rows["forks"][1] == ["stock", "finished"]
    assert "hostile/run.json cannot be read" in done.stderr
    newest_first = json.loads(ndcheck_here("runs", ".", "--json").stdout)
    started = [run["started_at"] for run in newest_first]
    assert started == sorted(started, reverse=True)


def test_runs_show_what_the_gate_said_of_these_samples(ndcheck_here, folder):
    code = ndcheck_here("gate", "forks", "--max-unique", "5").returncode
    assert code == 0
    samples = folder / "forks" / "samples.jsonl"
    assert "scripted:batch-dependent  gate ACCEPTED" in ndcheck_here("runs", ".").stdout
    whole = samples.read_text()
    samples.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert "gate" not in ndcheck_here("runs", ".").stdout.partition("said")[2]
    samples.write_text(whole)
    (folder / "forks" / "gate.json").write_text('{"verdict": "FINE"}')
    done = ndcheck_here("runs", ".")
    assert "gate.json cannot be read" in done.stderr
    assert "scripted:batch-dependent\n" in done.stdout


@pytest.mark.parametrize("width", [60, 80])
def test_no_name_in_a_listing_is_cut(width):
    arm = {"verdict": "INCONCLUSIVE", "n_unique": 12, "diverged_trials": 100, "n_trials": 1000}
    arms = [{**arm, "arm": name, "latent_trials": 7} for name in ("stock", "invariant")]
    run = {
        "name": "20261129-140001-Qwen3-235B-A22B-Instruct",
        "model": "Qwen/Qwen3-235B-A22B-Instruct-2507",
        "gate": "INCONCLUSIVE",
        "arms": ["stock", "invariant"],
        "status": "finished",
        "by_arm": arms,
    }
    lines = [line.plain for line in run_lines([run], width)]
    assert max(map(len, lines)) <= width
    for name in (run["name"], run["model"], "gate INCONCLUSIVE", "100/1000", "7/1000"):
        assert any(name in line for line in lines), name


def test_no_runs(ndcheck_here, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        done = ndcheck_here("runs", name)
        assert done.returncode == 2
        assert name in done.stderr


def test_a_run_is_no_folder_of_runs(ndcheck_here, folder):
    for options in ((), ("--json",)):
        done = ndcheck_here("runs", "clean", *options)
        assert done.returncode == 2
        assert "clean is a run itself: ndcheck report clean shows it" in done.stderr
    (folder / "forks").rename(folder / "clean/forks")
    assert "forks" in ndcheck_here("runs", "clean").stdout


def test_characters_are_not_called_tokens(ndcheck_here, folder):
    for name in ("clean", "forks"):
        file = folder / name / "run.json"
        run = json.loads(file.read_text())
        run["environment"]["model"]["compared"] = "text"
        file.write_text(json.dumps(run))
    done = ndcheck_here("compare", "clean", "forks")
    assert re.search(r"common prefix +8 characters +3 characters\n", done.stdout)
    assert "characters/s" in done.stdout
