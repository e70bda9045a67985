"""The GitHub Action and the GitLab recipe: their steps run here, in a shell, as CI runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "tests" / "sample_repository"
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
WORKFLOW = ".github/workflows/determinism.yml"


class Runner:
    """Runs a job's steps: each in a bash of its own, until one fails, unless it says always()."""

    def __init__(self, workspace, python):
        self.workspace = workspace
        self.path = f"{Path(python).parent}:{os.environ['PATH']}"
        self.summary = workspace.parent / "summary.md"
        self.log = ""
        self.uploads = []

    def run_job(self, job, matrix):
        """True if every step succeeded."""
        return self._run_steps(job["steps"], {"matrix": matrix})[0]

    def _run_steps(self, steps, context):
        succeeded, context = True, {**context, "steps": {}}
        for step in steps:
            condition = str(step.get("if", ""))
            if not (succeeded or "always()" in condition) or not self._holds(condition, context):
                continue
            outcome, outputs = self._run_step(step, context)
            context["steps"][step.get("id")] = {"outputs": outputs}
            succeeded = succeeded and (outcome or step.get("continue-on-error", False))
        return succeeded, context

    def _holds(self, condition, context):
        unequal = re.search(r"([\w.-]+) != '(\w*)'", condition)
        return unequal is None or self._look_up(unequal[1], context) != unequal[2]

    def _run_step(self, step, context):
        uses = step.get("uses", "")
        given = {k: self._fill(v, context) for k, v in step.get("with", {}).items()}
        if uses.startswith("ndcheck/ndcheck@"):
            return self._run_action(given)
        if uses.startswith("actions/upload-artifact@"):
            # As version 4 does, over all jobs of a workflow's run.
            is_free = given["name"] not in dict(self.uploads)
            self.uploads.append((given["name"], self.workspace / given["path"]))
            return is_free, {}
        if uses:
            return True, {}
        return self._run_script(step, context)

    def _run_action(self, given):
        defaults = {name: spec.get("default", "") for name, spec in ACTION["inputs"].items()}
        assert given.keys() <= defaults.keys()
        context = {"inputs": {**defaults, **given}, "github": {"action_path": str(ROOT)}}
        succeeded, context = self._run_steps(ACTION["runs"]["steps"], context)
        outputs = {k: self._fill(v["value"], context) for k, v in ACTION["outputs"].items()}
        return succeeded, outputs

    def _run_script(self, step, context):
        assert step["shell"] == "bash"
        assert "${{" not in step["run"]
        output = self.workspace.parent / "output"
        output.write_text("")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NDCHECK", "TRITON"))}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=self.workspace,
            env={
                **kept,
                **{k: self._fill(v, context) for k, v in step.get("env", {}).items()},
                "PATH": self.path,
                "GITHUB_ACTIONS": "true",
                "GITHUB_OUTPUT": str(output),
                "GITHUB_STEP_SUMMARY": str(self.summary),
                "HF_HUB_OFFLINE": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.log += done.stdout
        outputs = dict(line.split("=", 1) for line in output.read_text().splitlines())
        return done.returncode == 0, outputs

    def _fill(self, text, context):
        return re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda m: self._look_up(m[1], context), str(text))

    def _look_up(self, path, context):
        value = context
        for part in path.split("."):
            value = value.get(part, {})
        return value or ""


@pytest.fixture
def repository(tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def run_workflow(repository, warm_python):
    def run(uploads=(), **matrix):
        runner = Runner(repository, warm_python())
        runner.uploads += uploads
        (job,) = yaml.safe_load((repository / WORKFLOW).read_text())["jobs"].values()
        succeeded = runner.run_job(job, matrix)
        return SimpleNamespace(
            succeeded=succeeded,
            verdict=(repository / "verdict.txt").read_text().strip(),
            log=runner.log,
            summary=runner.summary.read_text() if runner.summary.exists() else "",
            uploads=runner.uploads,
        )

    return run


@pytest.mark.parametrize(
    ("check", "succeeded", "verdict", "annotation"),
    [
        ("stock", False, "fail", "::error title=ndcheck FAIL%3A stock::ndcheck run --loads 1,2"),
        ("invariant", True, "pass", None),
        ("vacuous", False, "inconclusive", "::warning title=ndcheck INCONCLUSIVE%3A vacuous::"),
    ],
)
def test_the_sample_repository(run_workflow, check, succeeded, verdict, annotation):
    job = run_workflow(check=check)
    assert (job.succeeded, job.verdict) == (succeeded, verdict), job.log
    assert f"### {verdict.upper()}: {check}" in job.summary
    if annotation:
        assert annotation in job.log
    else:
        assert "::error" not in job.log
        assert "::warning" not in job.log
    ((name, kept),) = job.uploads
    assert name == f"ndcheck-{check}"
    assert len(list(kept.glob("*/samples.jsonl"))) == 1
    (suite,) = ET.parse(kept / "junit.xml").getroot()
    assert suite.get("name") == check
    assert (suite.get("failures") != "0") == (verdict == "fail")


SCRIPTED = """
max_tokens = 8
loads = [1, 4]
samples = 40
[checks.good]
model = "scripted:clean"
[checks.bad]
model = "scripted:batch-dependent"
[checks.open]
model = "scripted:never-batches"
"""


@pytest.mark.parametrize(
    ("given", "succeeded", "verdict"),
    [
        ({"check": "good\nbad"}, False, "fail"),
        ({"check": "good\n"}, True, "pass"),
        ({"check": "bad", "options": "--max-unique 2 --quiet"}, True, "pass"),
        ({"check": "bad", "options": "--quiet\n--max-unique 2\n"}, True, "pass"),
        ({"check": "open", "inconclusive": "pass", "artifact": "none"}, True, "pass"),
        ({"check": "open", "inconclusive": "fail"}, False, "fail"),
        ({"config": "none.toml"}, False, "error"),
        ({"check": "$(touch injected); `touch injected`"}, False, "error"),
    ],
)
def test_inputs(repository, run_workflow, given, succeeded, verdict):
    (repository / "ndcheck.toml").write_text(SCRIPTED)
    file = repository / WORKFLOW
    workflow = yaml.safe_load(file.read_text())
    workflow["jobs"]["determinism"]["steps"][1]["with"] = {"install": "none", **given}
    file.write_text(yaml.safe_dump(workflow))
    job = run_workflow()
    assert (job.succeeded, job.verdict) == (succeeded, verdict), job.log
    assert not (repository / "injected").exists()
    assert bool(job.uploads) == (given.get("artifact") != "none")


def test_an_artifact_that_cannot_be_kept_is_no_verdict(repository, run_workflow):
    """Another job of the matrix has its name already."""
    (repository / "ndcheck.toml").write_text(SCRIPTED)
    taken = [("ndcheck-good", None)]
    job = run_workflow(uploads=taken, check="good")
    assert len(job.uploads) == 2
    assert (job.succeeded, job.verdict) == (True, "pass"), job.log
    job = run_workflow(uploads=[("ndcheck-bad", None)], check="bad")
    assert (job.succeeded, job.verdict) == (False, "fail"), job.log


def block(name):
    text = "".join((ROOT / file).read_text() for file in ("README.md", "ndcheck/README.md"))
    return re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", text, re.DOTALL)[1]


def test_the_workflow_of_the_readme_fits_the_action():
    steps = yaml.safe_load(block("gate workflow"))["jobs"]["determinism"]["steps"]
    (step,) = (step for step in steps if step.get("uses", "").startswith("ndcheck/"))
    assert step["with"].keys() <= ACTION["inputs"].keys()
    used = re.findall(r"steps\.ndcheck\.outputs\.([\w-]+)", block("gate workflow"))
    assert used
    assert set(used) <= ACTION["outputs"].keys()


def test_the_gitlab_recipe_with_the_configuration_of_the_readme(tmp_path, warm_python):
    job = yaml.safe_load(block("gate gitlab"))["determinism"]
    install, gate = job["script"]
    assert install == "pip install ndcheck"
    (tmp_path / "ndcheck.toml").write_text(block("gate config"))
    (tmp_path / "bin").mkdir()
    installed = tmp_path / "bin" / "ndcheck"
    installed.write_text(f'#!/bin/sh\nexec {warm_python()} -m ndcheck "$@"\n')
    installed.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", gate],
        cwd=tmp_path,
        env={**kept, "PATH": f"{installed.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("PASS  queue\n")
    assert (tmp_path / job["artifacts"]["reports"]["junit"]).is_file()
