"""Someone else's run: nothing of it runs or is sent unless the command line says so."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parents[2] / "runs" / "schema-1"
KEY = "sk-private-0123456789"
OPTIONS = ("--model", "scripted:clean", "--max-tokens", "8", "--loads", "1,4", "-n", "40", "-q")


@pytest.fixture
def server():
    """A loopback server that keeps whatever it is asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, dict(self.headers)))
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.asked, server.url = asked, f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hostile(tmp_path):
    """``hostile(**spec)``: a run that ended early, whose spec holds what its owner wants of us.

    Its last line, where it has one, is of a completion that diverged.
    """

    def make(n_lines=0, **changed):
        path = shutil.copytree(FIXTURE, tmp_path / "hostile")
        lines = (path / "samples.jsonl").read_text().splitlines()[:n_lines]
        if lines:
            last = json.loads(lines[-1])
            lines[-1] = json.dumps({**last, "token_ids": last["token_ids"][::-1]})
        (path / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines))
        document = json.loads((path / "run.json").read_text())
        document["status"] = "interrupted"
        document["spec"] |= changed
        (path / "run.json").write_text(json.dumps(document))
        return path

    return make


@pytest.fixture
def planted(tmp_path, tiny_models):
    """A model whose code leaves a mark when it runs."""
    path = shutil.copytree(tiny_models["llama"], tmp_path / "planted")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "planted.PlantedConfig", "AutoModelForCausalLM": "planted.PlantedModel",
    }  # fmt: skip
    config["model_type"] = "planted"
    (path / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "it-ran"
    (path / "planted.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    return path, mark


def endpoint(url, **changed):
    return {
        "url": url, "api_key_file": None, "header_names": [], "arrival": "together",
        "fillers": "words", "timeout_s": 5.0, "n_retries": 0, **changed,
    }  # fmt: skip


def assert_one_line(done, *parts):
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    for part in parts:
        assert part in line


VERBS = {"resume": ("run", "--resume"), "trace": ("trace", "--run"), "shrink": ("shrink", "--run")}


@pytest.mark.parametrize("verb", VERBS)
def test_planted_code_does_not_run(ndcheck, hostile, planted, verb):
    path, mark = planted
    n_lines = 0 if verb == "resume" else 7
    run = hostile(n_lines, model=str(path), trust_remote_code=True)
    assert_one_line(ndcheck(*VERBS[verb], run, "-q" if verb != "shrink" else "--json"),
                    "if you trust this run, add --trust-remote-code")  # fmt: skip
    assert not mark.exists()
    # The control: it does run where the command line agrees.
    ndcheck(*VERBS[verb], run, "--trust-remote-code")
    assert mark.exists()


def test_nothing_is_sent_to_a_planted_address(ndcheck, hostile, server, tmp_path):
    (tmp_path / "key").write_text(KEY)
    planted = endpoint(server.url, api_key_file=str(tmp_path / "key"), header_names=["X-Team"])
    run = hostile(model="m", endpoint=planted, arms=["stock"])
    environment = {"NDCHECK_API_KEY": KEY}
    needed = f"--endpoint {server.url} --api-key-file {tmp_path / 'key'} --header 'X-Team: VALUE'"
    wrong = (
        (), ("--endpoint", "http://127.0.0.1:9/v1"), ("--endpoint", server.url),
        ("--api-key-file", tmp_path / "key"), ("--header", "X-Team: a"),
        ("--endpoint", server.url, "--api-key-file", tmp_path / "other"),
    )  # fmt: skip
    for options in wrong:
        done = ndcheck("run", "--resume", run, *options, env=environment)
        assert_one_line(done, needed)
        assert KEY not in done.stderr
    for verb in ("trace", "shrink"):
        assert ndcheck(*VERBS[verb], run, env=environment).returncode == 2
    assert server.asked == []
    # The control: with all of it given again, the server is asked, with the key.
    options = (
        "--endpoint",
        server.url,
        "--api-key-file",
        tmp_path / "key",
        "--header",
        "X-Team: a",
    )
    ndcheck("run", "--resume", run, *options)
    assert any(KEY in str(headers) for _, headers in server.asked)


@pytest.mark.parametrize(
    ("changed", "needed"),
    [
        ({"attention": "someone/kernels"}, "--attn someone/kernels"),
        (
            {"engine": {"name": "vllm", "arguments": ["worker_cls=evil.Worker"]}},
            "--engine-arg worker_cls=evil.Worker",
        ),
        ({"endpoint": endpoint("http://me:hunter2@127.0.0.1:9/v1")}, "leave out user, password"),
        ({"n_samples": 999_999_999}, "--samples 999999999"),
        ({"batch_sizes": [1, 999_999_999]}, "--loads 999999999"),
        ({"target_rate": 1e-12}, "--target-rate"),
        ({"answer_pattern": "("}, "--answer-pattern"),
        ({"chat": True, "chat_template_kwargs": "@/etc/hostname"}, "not a file's name"),
        (
            {"endpoint": endpoint("http://127.0.0.1:9/v1") | {"extra_body": '{"webhook":"evil"}'}},
            """--extra-body '{"webhook":"evil"}'""",
        ),
        (
            {"endpoint": endpoint("http://127.0.0.1:9/v1") | {"query": ["code"]}},
            "--query code=VALUE",
        ),
    ],
)
def test_what_else_needs_the_command_line(ndcheck_here, hostile, changed, needed):
    run = hostile(arms=["stock"], model="m", **changed)
    started = time.monotonic()
    done = ndcheck_here("run", "--resume", run)
    assert_one_line(done, needed)
    assert "hunter2" not in done.stderr
    assert time.monotonic() - started < 30  # Not after planning for ever.


def test_options_that_the_run_did_not_have_are_refused(ndcheck_here, tmp_path):
    assert ndcheck_here("run", *OPTIONS, "--stop-on-divergence", "--out", "run").returncode == 0
    for option in (
        ("--trust-remote-code",),
        ("--endpoint", "http://127.0.0.1:9/v1"),
        ("--attn", "x"),
    ):
        done = ndcheck_here("run", "--resume", "run", *option)
        assert_one_line(done, f"{option[0]} cannot be changed")
    assert ndcheck_here("run", "--resume", "run", "-q").returncode == 0


@pytest.mark.parametrize("pattern", ["(a|aa)+$", "(?:a?){40}a{40}$", "^(a+)+$"])
def test_an_answer_pattern_cannot_hang(ndcheck_here, tmp_path, monkeypatch, pattern):
    from ndcheck.analysis import answers

    monkeypatch.setattr(answers, "ANSWERS_TIMEOUT_S", 0.2)
    answers.PatternParser.of.cache_clear()
    run = shutil.copytree(FIXTURE, tmp_path / "run")
    document = json.loads((run / "run.json").read_text())
    document["spec"]["answer_pattern"] = pattern
    (run / "run.json").write_text(json.dumps(document))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        sample["token_texts"] = ["a" * 60] * (len(sample["token_ids"]) - 1) + ["b"]
    (run / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    for command in (("report", run, "--json"), ("gate", run), ("compare", run, run)):
        assert ndcheck_here(*command).returncode in (0, 1, 3)
    answers.PatternParser.of.cache_clear()


def test_an_answer_pattern_that_ends_is_used(ndcheck_here, tmp_path):
    run = shutil.copytree(FIXTURE, tmp_path / "run")
    document = json.loads((run / "run.json").read_text())
    document["spec"]["answer_pattern"] = r"# (\w+)"
    (run / "run.json").write_text(json.dumps(document))
    found = json.loads(ndcheck_here("report", run, "--json").stdout)
    assert found["probes"][0]["metrics"]["TARa@N"] == 1.0


FILES = ("samples.jsonl", "run.json", "report.md", "report.html", "samples.csv", "summary.csv")


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_written_through_a_link(ndcheck_here, tmp_path, name):
    ndcheck_here("run", *OPTIONS, "--html", "--out", "run")
    outside = tmp_path / "outside"
    file = tmp_path / "run" / name
    file.rename(outside)
    before = outside.read_bytes()
    file.symlink_to(outside)
    for command in (("report", "run", "--html"), ("run", "--resume", "run", "-q")):
        ndcheck_here(*command)
        assert outside.read_bytes() == before


def test_no_plot_is_written_through_a_link(ndcheck_here, tmp_path):
    ndcheck_here("run", *OPTIONS, "--out", "run")
    (tmp_path / "outside").mkdir()
    (tmp_path / "run" / "plots").symlink_to(tmp_path / "outside")
    done = ndcheck_here("report", "run", "--plots")
    assert done.returncode == 4
    assert "plots is a link" in done.stderr
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_script_is_not_written_through_a_link(ndcheck_here, warm_python, monkeypatch, tmp_path):
    """`shrink` leaves one in the run's directory, and runs it."""
    monkeypatch.setattr(sys, "executable", warm_python())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = ("--loads", "1,4", "-n", "20", "--max-tokens", "12", "--kernels", "stock", "-q")
    ndcheck_here("run", *options, "--out", "run")
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "run" / "repro.py").symlink_to(tmp_path / "outside")
    ndcheck_here("shrink", "--run", "run")
    assert (tmp_path / "outside").read_text() == "mine"


def test_outputs_that_are_no_files_stay(ndcheck_here, tmp_path):
    ndcheck_here("run", *OPTIONS, "--out", "run")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("pipe", "device"):
        done = ndcheck_here("gate", "run", "--junit", name)
        assert done.returncode == 4
        assert f"{name} is no file" in done.stderr
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "device").is_symlink()


@pytest.mark.parametrize("width", range(38, 80, 3))
def test_nothing_in_a_run_is_a_command_to_githubs_runner(ndcheck_here, hostile, width):
    """It obeys ``::`` at the start of a line, after white space, and ``##[`` anywhere."""
    run = hostile(n_lines=3)
    key = f"##[error]a {' ::stop-commands::pause' * 9}"
    samples = (run / "samples.jsonl").read_text()
    (run / "samples.jsonl").write_text(json.dumps({key: 1}) + "\n" + samples)
    document = json.loads((run / "run.json").read_text()) | {"changes": [key]}
    (run / "run.json").write_text(json.dumps(document))
    github = {"GITHUB_ACTIONS": "true", "COLUMNS": str(width)}
    done = ndcheck_here("gate", run, env=github)
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    own = [line for line in lines if line.startswith(("::error title=", "::warning title="))]
    assert len(own) == 1
    assert "stop-commands" in "".join(done.stdout.split())
    assert not [x for x in lines if x.strip().startswith("::") and x not in own]
    assert not [line for line in lines if "##[" in line and line not in own]
    as_json = ndcheck_here("gate", run, "--json", env=github)
    assert "##[" not in as_json.stdout
    assert key in json.loads(as_json.stdout)["checks"][0]["reasons"]
