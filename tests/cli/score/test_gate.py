"""`ndcheck gate` on what `ndcheck score --out` left: rules as flags and from a file, for CI."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import xmlschema

import ndcheck

SCHEMA = Path(__file__).parents[2] / "reports" / "junit.xsd"


@pytest.fixture
def keep(ndcheck_here, recorded, write_lines, computer):
    """``keep(name, change)``: a directory of what ``change`` makes of the recorded numbers."""

    def start(name, change=list):
        scored = write_lines(f"{name}.jsonl", computer.lines(change=change))
        ndcheck_here("score", recorded, "--file", scored, "--out", name, "-q")
        return name

    return start


def test_a_planted_bit_fails_until_a_limit_accepts_it(ndcheck_here, keep, computer):
    planted = keep("planted", computer.plant)
    for options, code, word in (
        ((), 1, "FAIL"),
        (("--bitwise", "--max-kl", 1), 1, "FAIL"),
        (("--max-logprob-difference", 1e-3), 0, "ACCEPTED"),
        (("--max-logprob-difference", 1e-9), 1, "FAIL"),
        (("--max-kl", 1e-3), 0, "ACCEPTED"),
        (("--max-kl", 0), 1, "FAIL"),
    ):
        done = ndcheck_here("gate", planted, *options)
        assert (done.returncode, word in done.stdout) == (code, True), options
    shown = " ".join(ndcheck_here("gate", planted).stdout.split())
    assert "3 of 360 tokens differ, in 3 of 3 completions, first at token 98" in shown


def test_without_a_control_that_was_caught_nothing_passes(ndcheck_here, keep):
    echo = keep("echo")
    done = ndcheck_here("gate", echo, "--json", "--max-kl", "1")
    document = json.loads(done.stdout)
    assert (done.returncode, document["exit_code"]) == (3, 3)
    (check,) = document["checks"]
    assert check["verdict"] == "INCONCLUSIVE"
    assert {r["rule"]: r["verdict"] for r in check["rules"]} == {
        "max_kl": "PASS",
        "evidence": "INCONCLUSIVE",
    }
    assert ndcheck_here("gate", echo, "--inconclusive", "fail").returncode == 1


def test_a_file_names_scores_beside_runs(ndcheck_here, keep, computer, tmp_path):
    keep("planted", computer.plant)
    (tmp_path / "ndcheck.toml").write_text("""
max_tokens = 8
loads = [1, 4]
samples = 40
rules = { max_unique = 1 }
[checks.clean]
model = "scripted:clean"
[checks.bits]
score = "planted"
[checks.near]
score = "planted"
rules = { max_kl = 1e-3, max_logprob_difference = 1e-3 }
""")
    done = ndcheck_here("gate", "-q", "--junit", "junit.xml", "--json", "--out", "runs")
    assert done.returncode == 1
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {name: check["verdict"] for name, check in checks.items()} == {
        "clean": "PASS",
        "bits": "FAIL",
        "near": "PASS",
    }
    assert any(rule["accepts_divergence"] for rule in checks["near"]["rules"])
    xmlschema.validate(tmp_path / "junit.xml", SCHEMA)
    suites = {s.get("name"): s for s in ET.parse(tmp_path / "junit.xml").getroot()}
    assert [len(list(suites[n].iter("failure"))) for n in ("clean", "bits", "near")] == [0, 1, 0]
    # The command that a failure leads with gives the same verdict.
    command = checks["bits"]["command"].split()
    assert command[:2] == ["ndcheck", "gate"]
    assert ndcheck_here(*command[1:]).returncode == 1
    assert ndcheck_here("gate", "planted", "--check", "near").returncode == 0
    assert ndcheck_here("gate", "--check", "near", "--max-kl", "0", "-q").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("gate", "kept", "--max-unique", 1), "--max-unique: this is for a run"),
        (("gate", "kept", "--arms", "stock"), "--arms: this is for a run"),
        (("gate", "run", "--max-kl", 1), "--max-kl: this is for what ndcheck score --out"),
        (("gate", "run", "--bitwise"), "--bitwise: this is for what ndcheck score --out"),
        (("gate", "kept", "--max-kl", -1), "--max-kl -1.0: give nats, 0 or more"),
        (("gate", "kept", "--save-baseline", "x"), "--save-baseline: give one RUN"),
        (("gate", "kept", "--check", "of-run"), "--check of-run: it judges a run, and kept is a"),
        (("gate", "run", "--check", "of-score"), "--check of-score: it judges a score, and run is"),
        (("gate", "--check", "gone"), "*gone holds no score: ndcheck score RUN --out"),
        (("gate", "--config", "kind.toml"), "kind.toml: checks.a.rules.max_kl: unknown key"),
        (("gate", "--config", "rule.toml"), "rule.toml: checks.a.rules.max_unique: unknown key"),
        (("gate", "--config", "option.toml"), "option.toml: checks.a.loads: unknown key"),
        (("gate", "--config", "value.toml"), "value.toml: checks.a.rules.max_kl -1: give nats"),
        (("score", "recorded.jsonl", "--out", "kept"), "--out kept: it is not empty"),
    ],
)
def test_what_could_not_fail_is_refused_in_a_line(ndcheck_here, keep, tmp_path, arguments, line):
    keep("kept")
    run = tmp_path / "run"
    ndcheck.measure("scripted:clean", loads=[1, 4], samples=40, max_tokens=8, out=run)
    for name, text in {
        "ndcheck": '[checks.of-run]\nmodel = "scripted:clean"\n[checks.of-score]\nscore = "kept"\n'
        '[checks.gone]\nscore = "gone"\n',
        "kind": '[checks.a]\nmodel = "scripted:clean"\nrules = { max_kl = 1 }\n',
        "rule": '[checks.a]\nscore = "kept"\nrules = { max_unique = 1 }\n',
        "option": '[checks.a]\nscore = "kept"\nloads = [1]\n',
        "value": '[checks.a]\nscore = "kept"\nrules = { max_kl = -1 }\n',
    }.items():
        (tmp_path / f"{name}.toml").write_text(text)
    done = ndcheck_here(*arguments, "-q")
    assert (done.returncode, done.stdout) == (2, "")
    (said,) = done.stderr.splitlines()
    assert line.removeprefix("*") in said
    assert line.startswith("*") or said.startswith(f"ndcheck: {line}")


@pytest.mark.parametrize(
    "change",
    [
        {"n_differ": 0},
        {"n_differ": 361},
        {"first_difference": None},
        {"first_difference": -1},
        {"n_differing_completions": 0},
        {"n_differing_completions": 4},
        {"max_difference": 0.0},
        {"max_difference": None},
        {"k3_kl": "small"},
        {"n_distinct": 10**6},
        {"n_tokens": 0},
        {"n_tokens": 1e400},
        {"is_rounded": None},
        {"arm": "other"},
    ],
)
def test_a_file_that_contradicts_itself_is_refused(ndcheck_here, keep, tmp_path, computer, change):
    file = tmp_path / keep("planted", computer.plant) / "score.json"
    document = json.loads(file.read_text())
    document["arms"][0] |= change
    file.write_text(json.dumps(document))
    done = ndcheck_here("gate", "planted")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("ndcheck: planted/score.json cannot be read: ")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"arms": []}', "\x00"])
def test_a_damaged_file_is_refused(ndcheck_here, tmp_path, text):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "score.json").write_text(text)
    done = ndcheck_here("gate", "kept")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("version", [None, 0, 2, True, "1"])
def test_a_score_of_another_schema_is_refused(ndcheck_here, keep, tmp_path, computer, version):
    file = tmp_path / keep("planted", computer.plant) / "score.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "schema_version": version}))
    done = ndcheck_here("gate", "planted", "--max-kl", "1e9")
    assert (done.returncode, done.stdout) == (2, "")
    assert "schema version" in done.stderr


def test_a_score_beside_a_run_hides_no_failure(ndcheck_here, keep, tmp_path):
    run = tmp_path / "run"
    ndcheck.measure("scripted:latent", loads=[1, 4], samples=40, max_tokens=8, out=run)
    assert ndcheck_here("gate", "run").returncode == 1
    score = tmp_path / keep("echo") / "score.json"
    (run / "score.json").write_bytes(score.read_bytes())
    done = ndcheck_here("gate", "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "run holds a run and a score" in done.stderr
