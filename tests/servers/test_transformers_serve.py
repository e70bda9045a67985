"""`transformers serve` with the embedded model, for real: what it cannot tell is not made up."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from transformers.utils.import_utils import is_serve_available

from ndcheck.builtin import MODEL_DIRECTORY

pytestmark = pytest.mark.skipif(
    not is_serve_available(), reason="needs pip install 'transformers[serving]'"
)
# Without these limits continuous batching takes all memory of a machine without a GPU.
BATCHING = (
    *("--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "256"),
    *("--cb-block-size", "32", "--no-cb-use-cuda-graph"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server with continuous batching."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cache = tmp_path_factory.mktemp("cache")
    log = cache / "log.txt"
    command = ["serve", str(MODEL_DIRECTORY), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *command, *BATCHING],
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "HF_HUB_CACHE": str(cache),
                "OMP_WAIT_POLICY": "PASSIVE",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def test_a_run_against_it(server, tmp_path):
    """Its verdict is whatever it earns; what a run has to show is how that came about."""
    options = ["--endpoint", server, "--model", str(MODEL_DIRECTORY), "--max-tokens", "24"]
    options += ["--loads", "1,4", "-n", "16", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "ndcheck", "run", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert "compared: text, no logprobs" in done.stderr
    assert "batch size from: client-side overlap" in done.stderr
    text = (tmp_path / "run" / "samples.jsonl").read_text()
    samples = [json.loads(line) for line in text.splitlines()]
    assert not [sample["error"] for sample in samples if sample["error"]]
    batches = [s for s in samples if s["batch_size"] == 4]
    assert {s["achieved_batch_size"] for s in batches} == {4}
    # It counts its tokens, so a completion cut short would have been an error.
    assert all(s["finish_reason"] == "length" for s in samples)
    text = "".join(samples[0]["token_texts"])
    assert len(samples[0]["token_ids"]) == len(text) > 24
    names = {file.name for file in (tmp_path / "run").glob("*.csv")}
    assert names == {"samples.csv", "completions.csv", "loads.csv", "summary.csv"}
    assert "answers were seen to arrive interleaved" in (tmp_path / "run" / "report.md").read_text()
