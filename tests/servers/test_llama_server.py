"""llama.cpp's own server, where it is built: its batch is read, and its ids and bits compared."""

from __future__ import annotations

import os
import shutil

import pytest

SERVER = os.environ.get("NDCHECK_LLAMA_SERVER") or shutil.which("llama-server")
MODEL = os.environ.get("NDCHECK_GGUF")

pytestmark = pytest.mark.skipif(
    not SERVER or not MODEL,
    reason="llama.cpp takes minutes to compile: build llama-server (results/servers/README.md), "
    "then set NDCHECK_LLAMA_SERVER and NDCHECK_GGUF",
)


def test_a_run_against_it(serve, run_against):
    url = serve(
        *(SERVER, "-m", MODEL, "--host", "127.0.0.1", "--port", "PORT"),
        *("-np", "8", "-c", "8192", "-t", "1", "--metrics"),
    )
    stderr, samples = run_against(
        url, "--model", "any", "--max-tokens", 32, "--loads", "1,4", "-n", 40
    )
    assert "compared: token ids, logprobs of " in stderr
    assert "from: llamacpp:requests_processing; prefix cache: cache_prompt" in stderr
    assert {(s["batch_size"], s["achieved_batch_size"]) for s in samples} == {(1, 1), (4, 4)}
    assert {len(s["token_ids"]) * 8 for s in samples} == {len(s["logprob_bits"]) for s in samples}
    assert {s["cache_state"] for s in samples} == {"whole", "prefix"}
