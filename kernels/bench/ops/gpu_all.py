"""Everything that needs a GPU, in one command: bits and accuracy first, then the benches.

    PYTHONPATH=kernels python -m bench.ops.gpu_all OUT_DIR [COMMIT]

Writes matmul.csv, attention.csv, rows.csv, tests.txt and environment.json to OUT_DIR. It needs
pytest, takes under three minutes on an H200, and fails if a test fails. COMMIT is for copies of
the tree without its history.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
import triton

from bench.ops import attention, matmul, rows
from ndcheck_kernels.measure.timing import copy_gb_per_s, mm_tflop_per_s

REPOSITORY = Path(__file__).parents[3]
TESTS = ("tests/kernels/gpu", "tests/kernels/triton")


def environment(commit: str) -> dict[str, object]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": commit or _output("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "copy_gb_per_s": round(copy_gb_per_s()),
        "mm_8192_bf16_tflop_per_s": round(mm_tflop_per_s()),
    }


def _output(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    return run.stdout.strip()


def main(out: Path, commit: str = "") -> int:
    out.mkdir(parents=True, exist_ok=True)
    about = environment(commit)
    (out / "environment.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(about, flush=True)
    tests = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    with (out / "tests.txt").open("w", encoding="utf-8") as log:
        status = subprocess.run(
            [*tests, "--confcutdir=tests/kernels", *TESTS], cwd=REPOSITORY, stdout=log, check=False
        ).returncode
    print((out / "tests.txt").read_text(encoding="utf-8")[-2000:], flush=True)
    torch.manual_seed(0)
    matmul.bench(out)
    attention.bench(out)
    rows.bench(out)
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
