"""The ladder of requests in flight against `vllm serve`, stock and batch-invariant.

    PYTHONPATH=kernels python -m bench.engines.served results/engines

Run from the repository's root on a machine with a GPU and vLLM. A random checkpoint is written with
the embedded model's tokenizer; both servers start together and are measured one after the other, by
`ndcheck run --endpoint`. Each leaves its tables in a folder of OUT.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

from bench.reference.experiment import keep_files
from bench.table import rows_of

ROOT = Path(__file__).parents[3]
SHAPE = "kernels/bench/shapes/qwen3-1.4b"
MODES = {"served-stock": ("0", 8101), "served-invariant": ("1", 8102)}
START_S = 300
BUDGET_S = 150


def write_checkpoint(directory: Path) -> Path:
    """A model of the shape with random weights of seed 0, and a tokenizer."""
    import transformers

    from ndcheck.builtin import MODEL_DIRECTORY
    from ndcheck.request import DEFAULTS
    from ndcheck.samplers.vllm.checkpoint import random_checkpoint

    config = transformers.AutoConfig.from_pretrained(SHAPE)
    weights = random_checkpoint(SHAPE, config, replace(DEFAULTS, model=SHAPE, random_weights=0))
    shutil.copytree(weights, directory, dirs_exist_ok=True)
    for file in MODEL_DIRECTORY.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


def serve(checkpoint: Path, mode: str, log: Path) -> subprocess.Popen[bytes]:
    switch, port = MODES[mode]
    arguments = ["serve", str(checkpoint), "--served-model-name", "random", "--port", str(port)]
    arguments += ["--generation-config", "vllm", "--enable-prompt-tokens-details"]
    # Sizes given, so that no engine measures what the others leave free.
    arguments += ["--max-model-len", "2048", "--gpu-memory-utilization", "0.2"]
    arguments += ["--kv-cache-memory-bytes", str(12 * 10**9)]
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments],
            env={**os.environ, "VLLM_BATCH_INVARIANT": switch},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    """Until it answers. Raises RuntimeError if it ends or takes longer than START_S."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
        except (urllib.error.URLError, OSError):
            if server.poll() is not None:
                break
            time.sleep(1)
        else:
            return
    raise RuntimeError(f"vllm serve on port {port} did not start")


def measure(mode: str, out: Path) -> str:
    """The verdict of one server."""
    folder = out / mode
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "ndcheck", "run"]
    command += ["--endpoint", f"http://127.0.0.1:{MODES[mode][1]}/v1", "--model", "random"]
    command += ["--prompt", "Tell me about Richard Feynman", "--axes", "run-to-run,batch-size"]
    command += ["--loads", "1,2,4,8,16,32,64,128", "-n", "600", "--max-tokens", "128"]
    command += ["--out", str(folder), "--plots", "--quiet"]
    subprocess.run(command, cwd=ROOT, check=False, timeout=BUDGET_S)
    keep_files(folder)
    return rows_of(folder / "summary.csv")[0]["verdict"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint")
        logs = {mode: Path(folder) / f"{mode}.log" for mode in MODES}
        servers = {mode: serve(checkpoint, mode, log) for mode, log in logs.items()}
        try:
            verdicts = {}
            for mode, server in servers.items():
                wait_for(server, MODES[mode][1])
                verdicts[mode] = measure(mode, out)
        finally:
            for mode, server in servers.items():
                server.terminate()
                if server.wait(30) not in (0, -15):
                    print(mode, logs[mode].read_text(errors="replace")[-3000:])
    print(verdicts)
    return 0 if verdicts == {"served-stock": "FAIL", "served-invariant": "PASS"} else 1


if __name__ == "__main__":
    sys.exit(main())
