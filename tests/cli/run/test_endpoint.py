"""`ndcheck run --endpoint` as a user has it: killed servers, kept samples, secrets kept out."""

from __future__ import annotations

import json
import shutil
import signal
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ndcheck.cli.app import run_command_line

MODEL = ("--model", "mock", "--max-tokens", "8", "--loads", "1,3", "-n", "40", "--retries", "1")
KEY = "sk-never-to-be-seen-anywhere"


def finish(process):
    stdout, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr
    return process.returncode, stdout, stderr


def wait_for_samples(path, n_lines):
    for _ in range(1200):
        if path.exists() and path.read_bytes().count(b"\n") >= n_lines:
            return
        time.sleep(0.05)
    raise AssertionError("no samples appeared")


def test_a_killed_server_keeps_what_is_finished_and_resumes(started, tmp_path):
    server = started("mock-server", "--step-ms", "10")
    url = server.stdout.readline().strip()
    run = started("run", "--endpoint", url, *MODEL, "--out", "run")
    samples = tmp_path / "run" / "samples.jsonl"
    wait_for_samples(samples, 4)
    server.send_signal(signal.SIGKILL)
    code, stdout, stderr = finish(run)
    assert code == 4
    assert stdout.startswith("INCONCLUSIVE")
    assert f"ndcheck run --resume run --endpoint {url}" in stderr
    assert "ndcheck: the server is gone: cannot connect to" in stderr
    before = samples.read_text().splitlines()
    assert 4 <= len(before) < 41
    assert all(json.loads(line)["error"] is None for line in before)

    port = url.rpartition(":")[2].removesuffix("/v1")
    again = started("mock-server", "--port", port)
    assert again.stdout.readline().strip() == url
    code, stdout, stderr = finish(started("run", "--resume", "run", "--endpoint", url))
    assert code == 0, stdout + stderr
    after = samples.read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == 41  # the control is no sample


def test_a_server_that_is_not_there_is_a_backend_failure(started):
    code, _, stderr = finish(started("run", "--endpoint", "http://127.0.0.1:9/v1", *MODEL, "-q"))
    assert code == 4
    assert "--endpoint http://127.0.0.1:9/v1: cannot connect to http://127.0.0.1:9" in stderr


def test_tls_asked_of_a_server_that_speaks_plain_http(started):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{server.server_port}/v1"
        code, _, stderr = finish(started("run", "--endpoint", url, *MODEL, "-q"))
        server.shutdown()
    assert code == 4
    assert stderr.endswith("(where the server speaks plain HTTP, give http://)\n")


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_certificate_that_is_not_trusted_is_said_with_what_trusts_it(started, tmp_path):
    made = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1")
    files = ("-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem")
    subprocess.run(["openssl", *made, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *arguments: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{server.server_port}/v1"
        code, _, stderr = finish(started("run", "--endpoint", url, *MODEL, "-q"))
        server.shutdown()
    assert code == 4
    assert "self-signed certificate" in stderr
    assert stderr.endswith("give SSL_CERT_FILE=AUTHORITY.pem)\n")


def test_secrets_are_in_no_artifact(started, tmp_path):
    server = started("mock-server", "--fault", "repeat-key", "--after", "40", "--every", "5")
    url = server.stdout.readline().strip()
    header = ("--header", f"X-Team: {KEY}")
    run = started("run", "--endpoint", url, *MODEL, "--out", "run", *header, NDCHECK_API_KEY=KEY)
    code, stdout, stderr = finish(run)
    assert code == 3
    artifacts = [file.read_text() for file in (tmp_path / "run").iterdir()]
    assert any("bad key: [secret]" in text for text in artifacts)
    assert not [text for text in (stdout, stderr, *artifacts) if KEY in text]
    assert "--header 'X-Team: VALUE'" in (tmp_path / "run" / "report.md").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["spec"]["endpoint"][
        "header_names"
    ] == ["X-Team"]
    code, _, stderr = finish(started("run", "--resume", "run", "--endpoint", url))
    assert code == 2
    assert "--header 'X-Team: VALUE'" in stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--endpoint", "localhost:8000"), "give the address of an OpenAI API"),
        (("--endpoint", "http://me:hunter2@host/v1"), "leave out user, password and query"),
        (("--endpoint", "http://host/v1"), "give the name of a served model as --model"),
        (("--endpoint", "http://host/v1", "--model", "m", "--dtype", "bf16"), "--dtype: with"),
        (("--endpoint", "http://host/v1", "--kernels", "invariant"), "--kernels invariant: with"),
        (("--endpoint", "http://host/v1", "--arrivals", "poisson"), "--arrivals poisson: give"),
        (("--endpoint", "http://host/v1", "--timeout", "0"), "--timeout 0.0: give a positive"),
        (("--endpoint", "http://host/v1", "--fillers", "x"), "choose from words, shared-prefix"),
        (("--arrivals", "closed"), "--arrivals closed needs --batching continuous, or a server"),
        (("--timeout", "3"), "--timeout: this is for a server: give --endpoint"),
        (("--header", "X: y"), "--header: this is for a server: give --endpoint"),
        (("--header", "no colon"), "--header: give it as 'Name: value'"),
    ],
)
def test_bad_input_is_one_line(options, message, capsys):
    assert run_command_line(["run", *options]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert "hunter2" not in stderr
    assert stderr.count("\n") == 1
