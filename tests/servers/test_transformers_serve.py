"""`transformers serve` with the embedded model, for real: what it cannot tell is not made up."""

from __future__ import annotations

import sys

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


def test_a_run_against_it(serve, run_against, tmp_path):
    """Its verdict is whatever it earns; what a run has to show is how that came about."""
    url = serve(
        *(sys.executable, "-m", "transformers.cli.transformers", "serve", MODEL_DIRECTORY),
        *("--host", "127.0.0.1", "--port", "PORT", "--device", "cpu", *BATCHING),
        HF_HUB_OFFLINE="1",
        HF_HUB_CACHE=str(tmp_path),
    )
    stderr, samples = run_against(
        url, "--model", MODEL_DIRECTORY, "--max-tokens", 24, "--loads", "1,4", "-n", 16
    )
    assert "compared: text, no logprobs" in stderr
    assert "batch size from: client-side overlap" in stderr
    assert {(s["batch_size"], s["achieved_batch_size"]) for s in samples} == {(1, 1), (4, 4)}
    # It counts its tokens, so a completion cut short would have been an error.
    assert all(s["finish_reason"] == "length" for s in samples)
    assert all(len(s["token_ids"]) == len("".join(s["token_texts"])) > 24 for s in samples)
    names = {file.name for file in (tmp_path / "run").glob("*.csv")}
    tables = ("samples", "completions", "loads", "properties", "summary")
    assert names == {f"{name}.csv" for name in tables}
    assert "answers were seen to arrive interleaved" in (tmp_path / "run" / "report.md").read_text()
