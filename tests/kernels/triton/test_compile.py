"""Every kernel compiled for seven architectures, in every configuration that can be selected.

Each runs in its own process: this one may have set up the interpreter, which compiles nothing. No
GPU is needed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[3] / "kernels"

# The matrix instructions of each architecture; small tiles use HMMA on all of them.
TENSOR_CORES = {
    80: {"HMMA"},
    89: {"HMMA"},
    90: {"HMMA", "HGMMA", "QGMMA"},
    100: {"HMMA", "UTCHMMA", "UTCQMMA"},
    120: {"HMMA", "QMMA"},
    "gfx942": {"v_mfma_f32_32x32x8_bf16", "v_mfma_f32_16x16x16_bf16"},
    "gfx950": {"v_mfma_f32_32x32x16_bf16", "v_mfma_f32_16x16x32_bf16"},
}
# Triton 3.9 spills more than 3.6, which made the GPU figures. Most of all spills the tile of 128
# queries over an FP8 cache, in chunks with ALiBi; without Hopper's own kernel 3.6 spills 256 there.
SPILLED = {("_prefill_kernel", c): n for c, n in ((90, 304), (89, 16), (120, 16))}
SPILLED["_decode_kernel", 90] = 88  # 64 rows over an FP8 cache, in 3.6; in chunks with ALiBi 24
SPILLED["_prefill_hopper_kernel", 90] = 280
SPILLED["_decode_hopper_kernel", 90] = 104  # while it merges parts
DOTS = ("_matmul", "_grouped", "_fp8", "_block_fp8", "_weight_only", "_prefill", "_decode")


def compile_in_a_process(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "bench.ops.every_launch", *map(str, arguments)],
        cwd=KERNELS,
        env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


# Every configuration takes minutes a chip, so by default one of each kind is compiled, for two
# chips whose matrix instructions differ.
ALWAYS = [(90, "kinds"), ("gfx942", "kinds")]
ON_DEMAND = [(100, "kinds"), *((capability, "figures") for capability in TENSOR_CORES)]


@pytest.mark.parametrize(
    ("capability", "extent"),
    [*ALWAYS, *(pytest.param(*each, marks=pytest.mark.slow) for each in ON_DEMAND)],
)
def test_shipped_configurations_fit_the_chip(capability, extent):
    from ndcheck_kernels.measure.resources import SHARED_LIMIT

    document = compile_in_a_process(capability, extent)
    assert document["failures"] == []
    kernels = document["kernels"]
    assert len(kernels) > 20
    for kernel in kernels:
        assert kernel["spilled_bytes"] <= SPILLED.get((kernel["name"], capability), 0), kernel
        assert kernel["shared_bytes"] <= SHARED_LIMIT[capability], kernel
        if kernel["name"].startswith(DOTS):
            assert TENSOR_CORES[capability] & set(kernel["instructions"]), kernel
    if capability == 90:
        assert any("UTMALDG" in kernel["instructions"] for kernel in kernels), "no TMA"
        assert any("HGMMA" in kernel["instructions"] for kernel in kernels), "no wgmma"


@pytest.mark.slow
@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_attention_of_every_head_dim_and_dtype_fits_the_chip(capability):
    from ndcheck_kernels.measure.resources import SHARED_LIMIT

    document = compile_in_a_process(capability, "all", "attentions")
    assert document["failures"] == []
    assert len(document["kernels"]) > 50
    for kernel in document["kernels"]:
        assert kernel["shared_bytes"] <= SHARED_LIMIT[capability], kernel


def test_importing_the_package_imports_no_triton():
    code = "import sys, ndcheck_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
