"""`ndcheck gate`: on runs and from a configuration, on screen and where CI systems look."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import xmlschema

import ndcheck
from ndcheck.errors import UsageError
from ndcheck.samplers.scripted.sampler import ScriptedSampler

SCHEMA = Path(__file__).parents[1] / "reports" / "junit.xsd"
CONFIG = """
max_tokens = 8
loads = [1, 4]
samples = 40
[checks.clean]
model = "scripted:clean"
[checks.forks]
model = "scripted:batch-dependent"
[checks.vacuous]
model = "scripted:never-batches"
[checks.dies]
model = "scripted:dies"
"""
REPEAT = "ndcheck run --model scripted:batch-dependent --loads 1,4 -n 40 --max-tokens 8"
SEEN = "tokens diverged in 4 of 4 loads; 4 of them repeated, alike each time"


@pytest.fixture
def config(tmp_path):
    (tmp_path / "ndcheck.toml").write_text(CONFIG)


@pytest.fixture
def gate(ndcheck_here):
    return partial(ndcheck_here, "gate")


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    ndcheck.measure("scripted:batch-dependent", loads=[1, 4], samples=40, max_tokens=8, out=path)
    return path


@pytest.fixture
def forked(tmp_path, measured_run):
    """A finished run, in the directory ``run``."""
    return shutil.copytree(measured_run, tmp_path / "run")


def test_all_checks_of_a_configuration(ndcheck_here, tmp_path, config):
    done = ndcheck_here("gate", "--quiet", "--junit", "out/junit.xml", "--out", "runs")
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines if not line.startswith("ndcheck run")) <= 80
    assert lines[lines.index("FAIL  forks") - 1].startswith(REPEAT)
    assert "4 checks: 1 PASS, 1 FAIL, 1 INCONCLUSIVE, 1 ERROR" in lines
    assert (tmp_path / "runs" / "vacuous" / "report.md").is_file()

    file = tmp_path / "out" / "junit.xml"
    xmlschema.XMLSchema(SCHEMA).validate(file)
    suites = {suite.get("name"): suite for suite in ET.parse(file).getroot()}
    counts = {
        name: tuple(int(suite.get(n)) for n in ("failures", "errors", "skipped"))
        for name, suite in suites.items()
    }
    assert counts == {
        "clean": (0, 0, 0),
        "forks": (2, 0, 0),
        "vacuous": (0, 1, 0),
        "dies": (0, 1, 0),
    }
    failures = list(suites["forks"].iter("failure"))
    assert all(failure.text.startswith(REPEAT) for failure in failures)
    assert [failure.get("message") for failure in failures] == [
        f"batch-size: {SEEN}",
        "17 of 25 loads diverged from the probe alone; 2 unique completions of 58",
    ]
    assert int(suites["forks"].get("tests")) == 9


@pytest.mark.parametrize(
    ("check", "code"), [("clean", 0), ("forks", 1), ("vacuous", 3), ("dies", 4)]
)
def test_exit_codes(gate, config, check, code):
    assert gate("--quiet", "--check", check).returncode == code


@pytest.mark.parametrize(
    ("outcome", "code", "tag"), [("pass", 0, "skipped"), ("fail", 1, "failure")]
)
def test_inconclusive_may_pass_or_fail(gate, tmp_path, config, outcome, code, tag):
    options = ("--check", "vacuous", "--inconclusive", outcome, "--junit", "j.xml")
    done = gate("--quiet", *options)
    assert done.returncode == code
    assert "INCONCLUSIVE  vacuous" in done.stdout
    (case,) = (c for c in ET.parse(tmp_path / "j.xml").iter("testcase") if len(c.findall(tag)))
    assert case.get("name") == "evidence stock p1"
    xmlschema.XMLSchema(SCHEMA).validate(tmp_path / "j.xml")


def test_flags_win_over_the_rules_of_a_configuration(gate, config):
    assert gate("--quiet", "--check", "forks").returncode == 1
    assert gate("--quiet", "--check", "forks", "--max-unique", "2").returncode == 0


def test_flags_are_rules_too(gate, forked):
    assert gate("run").returncode == 1
    assert gate("run", "--max-unique", "2").returncode == 0
    assert gate("run", "--max-unique", "1").returncode == 1
    assert gate("run", "--max-divergence-rate", "0.6").returncode == 3


def test_a_run_may_be_judged_by_the_rules_of_a_check(gate, tmp_path, forked):
    (tmp_path / "rules.toml").write_text(
        "[checks.a]\nmax_tokens = 8\n[checks.a.rules]\nmax_unique = 2"
    )
    assert gate("run", "--config", "rules.toml").returncode == 0
    done = gate("run", "--config", "rules.toml", "--max-unique", "1")
    assert done.returncode == 1


def test_where_only_stock_failed_the_arms_rule_is_named(gate, tmp_path):
    options = {"loads": [1, 4], "samples": 40, "max_tokens": 8, "kernels": "stock,invariant"}
    ndcheck.measure("scripted:batch-dependent", out=tmp_path / "both", **options)
    assert "--arms invariant" not in gate("both").stdout  # both arms failed
    lines = (tmp_path / "both" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    cured = next(s for s in samples if s["arm"] == "invariant" and s["batch_size"] == 1)
    for sample in samples:
        if sample["arm"] == "invariant" and sample["axis"] != "control":
            for field in ("token_ids", "token_texts", "logprob_bits", "row_digests", "margins"):
                sample[field] = cured[field]
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (tmp_path / "both" / "samples.jsonl").write_text(text)
    done = gate("both")
    assert done.returncode == 1
    assert (
        "only stock failed; to judge the invariant arm, with stock as its control: " in done.stdout
    )
    assert gate("both", "--arms", "invariant").returncode == 0


def test_json(gate, forked):
    done = gate("run", "--json")
    document = json.loads(done.stdout)
    (check,) = document["checks"]
    assert (document["exit_code"], check["verdict"], check["directory"]) == (1, "FAIL", "run")
    assert check["command"].startswith(REPEAT)
    assert {rule["verdict"] for rule in check["rules"]} == {"PASS", "FAIL"}


def test_what_github_shows(gate, tmp_path, forked):
    (tmp_path / "summary.md").write_text("before\n")
    github = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    done = gate("run", env=github)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("::"))
    assert line.startswith(f"::error title=ndcheck FAIL%3A run::{REPEAT}")
    assert line.endswith(f"%0Abatch-size: {SEEN}")
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("before\n## ndcheck: FAIL\n")
    assert f"```sh\n{REPEAT}" in summary
    assert f"| FAIL | batch-size | stock p1 | {SEEN} |" in summary
    assert not gate("run", "--max-unique", "2", env=github).stdout.count("::error")
    with_json = gate("run", "--json", env=github)
    assert json.loads(with_json.stdout)
    assert "::error" in with_json.stderr


def test_a_run_is_no_baseline_of_itself(gate):
    ndcheck.measure("scripted:clean", loads=[1, 4], samples=40, max_tokens=8, out="clean")
    gate("clean", "--save-baseline", "main")
    for baseline in ("main", "clean"):
        done = gate("clean", "--baseline", baseline)
        assert done.returncode == 3
        assert "nothing can drift" in done.stdout
        assert "PASS          baseline" not in done.stdout


def test_baselines(gate, tmp_path, forked):
    ndcheck.measure("scripted:clean", loads=[1, 4], samples=40, max_tokens=8, out="clean")
    assert "saved ndcheck-baselines/main" in gate("clean", "--save-baseline", "main").stderr
    for baseline in ("main", "clean"):
        done = gate("run", "--max-unique", "9", "--baseline", baseline)
        assert done.returncode == 1
        assert "baseline-unique" in done.stdout
    tolerant = ("--max-unique", "9", "--baseline", "main", "--fail-on", "tokens")
    assert gate("run", *tolerant).returncode == 0
    again = gate("run", "--save-baseline", "main")
    assert again.returncode == 2
    assert "remove it first" in again.stderr


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ((), ("ndcheck.toml", "[checks.NAME]")),
        (("nowhere",), ("nowhere holds no run",)),
        (("run", "--max-uniqe", "1"), ("--max-uniqe",)),
        (("run", "--max-unique", "0"), ("--max-unique: 0 is out of range; give 1 or more",)),
        (("run", "--arms", "invariant"), ("--arms invariant: the run has no such arm",)),
        (("run", "--inconclusive", "maybe"), ("--inconclusive", "'maybe'", "pass, fail")),
        (("run", "--inconclusive", "pass,fail"), ("--inconclusive pass,fail: give one of",)),
        (("run", "--out", "new"), ("--out: this is for the runs of checks",)),
        (("run", "--baseline", "mian"), ("mian holds no run",)),
        (("run", "--fail-on", "tokens"), ("--fail-on", "--baseline")),
        (("--config", "none.toml"), ("none.toml: No such file",)),
        (("--save-baseline", "x"), ("--save-baseline", "RUN")),
        (("--config", "rules.toml", "--out", "run"), ("--out run: it is not empty",)),
        (("--config", "rules.toml", "--check", "b"), ("--check b: unknown; rules.toml has a",)),
    ],
)
def test_bad_input(gate, tmp_path, forked, options, parts):
    (tmp_path / "rules.toml").write_text('[checks.a]\nmodel = "scripted:clean"\n')
    done = gate(*options)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        ('model = "scripted:none"', "checks.b: no scripted sampler named 'none'"),
        ('model = "./missing"', "checks.b.model ./missing"),
        ("max_tokens = 200000", "checks.b: prompt p1 has 2 tokens"),
        ('rules.baseline = "mian"', "checks.b: mian holds no run"),
        ("rules.max_uniqe = 1", "checks.b.rules.max_uniqe: unknown key, did you mean max_unique?"),
    ],
)
def test_a_mistake_in_the_last_check_is_found_before_the_first_runs(gate, tmp_path, mistake, line):
    model = "" if "model" in mistake else 'model = "scripted:clean"\n'
    text = f'[checks.a]\nmodel = "scripted:clean"\n[checks.b]\n{model}{mistake}\n'
    (tmp_path / "ndcheck.toml").write_text(text)
    done = gate("--quiet")
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"ndcheck: ndcheck.toml: {line}")
    assert not (tmp_path / "ndcheck-runs").exists()


def test_what_was_found_is_found_where_a_summary_cannot_be_written(gate, tmp_path, forked):
    github = {"GITHUB_STEP_SUMMARY": str(tmp_path)}
    done = gate(forked, "--junit", "junit.xml", env=github)
    assert done.returncode == 1
    assert f"cannot write to {tmp_path}: Is a directory" in done.stderr
    assert ET.parse(tmp_path / "junit.xml").getroot().get("failures") != "0"
    assert gate(forked, "--max-unique", "9", env=github).returncode == 4


@pytest.mark.parametrize("columns", ["0", "1", "19"])
def test_a_screen_without_columns_still_shows_the_verdict(gate, forked, columns):
    shown = gate(forked, env={"COLUMNS": columns}).stdout
    assert "4 of them repeated, alike each time" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("ends_it", "code", "errors"),
    [
        (KeyboardInterrupt(), 130, {"slow": "interrupted", "later": "not begun"}),
        (UsageError("op x: nothing covers it"), 1, {"slow": "checks.slow: op x: nothing covers"}),
    ],
)
def test_what_ends_a_check_takes_nothing_of_the_others_away(
    gate, tmp_path, monkeypatch, ends_it, code, errors
):
    """Ctrl-C, a job's time limit, or what a model refuses in its first trial."""
    sample = ScriptedSampler.sample

    def stop_slow(self, trial, probe, decoding):
        if self.describe()["digest"] == "slow" and trial.trial_id == 2:
            raise ends_it
        return sample(self, trial, probe, decoding)

    monkeypatch.setattr(ScriptedSampler, "sample", stop_slow)
    names = {"forks": "batch-dependent", "slow": "slow", "later": "clean"}
    tables = [f'[checks.{name}]\nmodel = "scripted:{model}"\n' for name, model in names.items()]
    (tmp_path / "ndcheck.toml").write_text("".join(("samples = 40\nloads = [1, 4]\n", *tables)))
    done = gate("-q", "--junit", "junit.xml")
    assert done.returncode == code
    suites = {suite.get("name"): suite for suite in ET.parse("junit.xml").getroot()}
    assert list(suites) == ["forks", "slow", "later"]
    assert any(case.find("failure") is not None for case in suites["forks"])
    assert "FAIL  forks" in done.stdout
    for name, words in errors.items():
        (error,) = suites[name].iter("error")
        assert words in error.get("message")
    assert ("PASS  later" in done.stdout) == (code == 1)
    if code == 130:
        assert "ndcheck run --resume" in done.stdout


def test_a_check_that_is_refused_alone_is_a_usage_error(gate, tmp_path, monkeypatch):
    def refuse(self, trial, probe, decoding):
        raise UsageError("op x: nothing covers it")

    monkeypatch.setattr(ScriptedSampler, "sample", refuse)
    (tmp_path / "ndcheck.toml").write_text('[checks.a]\nmodel = "scripted:clean"\n')
    done = gate("-q")
    assert done.returncode == 2
    assert "checks.a: op x: nothing covers it" in done.stdout
