"""llama.cpp's own server, where it is built: its batch is read, and its ids and bits compared."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

SERVER = os.environ.get("NDCHECK_LLAMA_SERVER") or shutil.which("llama-server")
MODEL = os.environ.get("NDCHECK_GGUF")

pytestmark = pytest.mark.skipif(
    not SERVER or not MODEL,
    reason="llama.cpp takes minutes to compile: build llama-server (results/servers/README.md), "
    "then set NDCHECK_LLAMA_SERVER and NDCHECK_GGUF",
)


@pytest.fixture
def server(tmp_path):
    """The address of a server with eight slots."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [SERVER, "-m", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, "-np", "8", "-c", "8192", "-t", "1", "--metrics"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (tmp_path / "log.txt").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def test_a_run_against_it(server, tmp_path):
    options = ["--endpoint", server, "--model", "any", "--max-tokens", "32", "--loads", "1,4"]
    done = subprocess.run(
        [sys.executable, "-m", "ndcheck", "run", *options, "-n", "40", "--out", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert "compared: token ids, logprobs of " in done.stderr
    assert (
        "batch size from: llamacpp:requests_processing; prefix cache: cache_prompt" in done.stderr
    )
    text = (tmp_path / "run" / "samples.jsonl").read_text()
    samples = [json.loads(line) for line in text.splitlines()]
    assert not [sample["error"] for sample in samples if sample["error"]]
    assert {(s["batch_size"], s["achieved_batch_size"]) for s in samples} == {(1, 1), (4, 4)}
    assert {len(s["token_ids"]) * 8 for s in samples} == {len(s["logprob_bits"]) for s in samples}
    assert {s["cache_state"] for s in samples} == {"whole", "prefix"}
