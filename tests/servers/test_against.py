"""Two servers under the same loads, compared as two arms."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest

from ndcheck.cli.app import run_command_line
from ndcheck.errors import BackendError
from ndcheck.mock_server.engine import ScriptedEngine
from ndcheck.samplers.endpoint.sampler import EndpointSampler
from ndcheck.storage.run_directory import SampleReader, read_run

SMALL = ("--model", "mock", "--loads", "1,3", "-n", "22", "--max-tokens", "8", "-q")
OTHER = 255
"""So many requests at most run in the server that is to compute otherwise."""


@pytest.fixture
def run_both(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(a, b, *options):
        code = run_command_line(["run", "--endpoint", a, "--against", b, *SMALL, *options])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def computes_otherwise(monkeypatch):
    """``computes_otherwise(change)``: the server with OTHER gives a changed fourth token."""

    def set_change(change):
        step = ScriptedEngine._next_token

        def changed(engine, request, n_running):
            token = step(engine, request, n_running)
            return change(token) if engine._max_batch == OTHER and request.n_done == 3 else token

        monkeypatch.setattr(ScriptedEngine, "_next_token", changed)

    return set_change


def test_equal_servers_pass_under_the_same_loads(mock, run_both, tmp_path):
    code, out, err = run_both(mock(), mock(), "--out", "both", "--json")
    document = json.loads(out)
    # A busy machine may leave a batch thin, which is inconclusive.
    verdicts = {run["verdict"] for run in document["runs"].values()}
    assert code == (0 if verdicts == {"PASS"} else 3), err
    assert {kind: found["verdict"] for kind, found in document["fail_on"].items()} == {
        "tokens": "PASS",
        "bits": "PASS",
    }
    assert [change["name"] for change in document["changes"] if change["group"] == "load"] == []
    runs = {name: read_run(tmp_path / "both" / name) for name in "ab"}
    loads = [
        [(s.trial_id, s.purpose, s.load) for s in SampleReader(tmp_path / "both" / name)]
        for name in "ab"
    ]
    assert loads[0] == loads[1]
    assert runs["a"].spec.endpoint.url != runs["b"].spec.endpoint.url


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda token: replace(token, token_id=token.token_id + 1, text="x"), "tokens"),
        (
            lambda token: replace(
                token, logprob=float(np.nextafter(np.float32(token.logprob), np.float32(-99)))
            ),
            "latent",
        ),
    ],
)
def test_what_only_the_comparison_shows_fails_it(mock, run_both, computes_otherwise, change, kind):
    computes_otherwise(change)
    code, out, err = run_both(mock(), mock(max_batch=OTHER), "--json")
    document = json.loads(out)
    assert (code, document["exit_code"]) == (1, 1), err
    assert "FAIL" not in {run["verdict"] for run in document["runs"].values()}, document["runs"]
    (drift,) = document["drifts"]
    assert drift["kind"] == kind
    assert drift["first_divergence"] == (3 if kind == "tokens" else None)
    if kind == "latent":
        code, out, _ = run_both(mock(), mock(max_batch=OTHER), "--allow-latent")
        assert code in (0, 3), out


def test_a_server_that_fails_by_itself_fails_both(mock, run_both):
    code, out, _ = run_both(mock(), mock(fault="concurrency"))
    assert code == 1
    assert any(line.startswith("FAIL  B  ") for line in out.splitlines())
    assert "FAIL  A  " not in out


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), BackendError("the server is gone")])
def test_where_the_second_ends_early_it_is_said_how_to_go_on(
    mock, run_both, monkeypatch, tmp_path, capsys, ending
):
    second, sample = mock(), EndpointSampler.sample

    def end(self, trial, probe, decoding):
        if second in self.describe()["endpoint"] and trial.trial_id == 3:
            raise ending
        return sample(self, trial, probe, decoding)

    monkeypatch.setattr(EndpointSampler, "sample", end)
    code, _, err = run_both(mock(), second, "--out", "both")
    assert code == (130 if isinstance(ending, KeyboardInterrupt) else 4)
    commands = re.findall(r"with: ndcheck (.*)", err)
    assert [command.split()[0] for command in commands] == ["run", "compare"]
    monkeypatch.setattr(EndpointSampler, "sample", sample)
    codes = [run_command_line(shlex.split(command)) for command in commands]
    assert codes[0] in (0, 3)  # A busy machine may leave a batch thin.
    assert codes[1] == 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--against", "http://127.0.0.1:9/v1"), "give --endpoint too"),
        (("--endpoint", "http://127.0.0.1:9/v1", "--against", "ftp://x"), "give the address"),
        (("--endpoint", "http://127.0.0.1:9/v1", "--against", "http://u:p@x/v1"), "leave out user"),
        (("--endpoint", "http://127.0.0.1:9/v1", "--against", "http://x", "--html"), "--against"),
        (("--resume", "r", "--against", "http://x"), "--against"),
    ],
)
def test_what_cannot_be_compared_is_one_line(monkeypatch, tmp_path, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    model = () if "--resume" in arguments else ("--model", "mock")
    assert run_command_line(["run", *arguments, *model]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert words in err
    assert not list(tmp_path.iterdir())
