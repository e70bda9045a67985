"""Hardware, software and numeric flags: what decides bits, and what two runs must share."""

from __future__ import annotations

import functools
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from ndcheck.records import Environment

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "ndcheck")
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "MKL_CBWR",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
MUST_MATCH = (
    "hardware.cpu",
    "hardware.gpu",
    "software.torch",
    "software.transformers",
    "software.cuda",
    "numeric_flags",
    "model.engine",
    "model.digest",
    "model.dtype",
    "model.device",
    "model.attention",
    "model.invariant_by",
)
"""Fields in which two runs must agree before their bits may be compared."""


def capture(model: dict[str, Any]) -> Environment:
    """This process's environment; ``model`` is what the sampler says of itself."""
    return Environment(
        hardware={**_cpu(), **_gpu()},
        software={
            "python": platform.python_version(),
            "platform": platform.platform(terse=True),
            **{name: _version(name) for name in PACKAGES},
            **_torch_build(),
        },
        numeric_flags=numeric_flags(),
        model=model,
    )


def capture_client(model: dict[str, Any]) -> Environment:
    """This client's; the hardware, versions and flags that decide bits are the server's own."""
    return Environment(
        software={
            "python": platform.python_version(),
            "platform": platform.platform(terse=True),
            **{name: _version(name) for name in ("ndcheck", "httpx2")},
        },
        model=model,
    )


def differences(a: Environment, b: Environment) -> list[str]:
    """``field: a's value, b's value`` for every field of MUST_MATCH in which they differ."""
    found = []
    for path in MUST_MATCH:
        x, y = _look_up(a, path), _look_up(b, path)
        if isinstance(x, dict) and isinstance(y, dict):
            parts = {f"{path}.{name}": (x.get(name), y.get(name)) for name in {**x, **y}}
        else:
            parts = {path: (x, y)}
        found += [f"{name}: {x}, now {y}" for name, (x, y) in parts.items() if x != y]
    return found


def numeric_flags() -> dict[str, Any]:
    """Switches of torch, cuBLAS and the process that change which kernels run."""
    import torch

    matmul, cuda = torch.backends.cuda.matmul, torch.backends.cuda
    return {
        "allow_tf32": matmul.allow_tf32,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "allow_bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
        "allow_fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "flash_sdp": cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        "mem_efficient_sdp": cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        "math_sdp": cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **{name: os.environ.get(name) for name in VARIABLES},
    }


def advice(flags: dict[str, Any], *, has_gpu: bool) -> list[str]:
    """What in ``flags`` weakens reproducibility on this machine, each with its remedy."""
    notes = []
    if flags["allow_tf32"] and has_gpu:
        notes.append(
            "TF32 is on: fp32 matrix products keep 10 bits of mantissa; turn it off with "
            "torch.backends.cuda.matmul.allow_tf32 = False"
        )
    if flags["allow_bf16_reduced_precision_reduction"] and has_gpu:
        notes.append(
            "bf16 split-K partial sums may be rounded to bf16: set torch.backends.cuda.matmul."
            "allow_bf16_reduced_precision_reduction = False to keep them in fp32"
        )
    if flags["CUBLAS_WORKSPACE_CONFIG"] is None and has_gpu:
        notes.append(
            "CUBLAS_WORKSPACE_CONFIG is not set: cuBLAS may pick other kernels from run to run "
            "on several streams; export CUBLAS_WORKSPACE_CONFIG=:4096:8"
        )
    if flags["cudnn_benchmark"]:
        notes.append(
            "cuDNN benchmark mode times kernels and keeps the fastest, which can differ from "
            "run to run: torch.backends.cudnn.benchmark = False"
        )
    return notes


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    name = None
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {"cpu": name or platform.processor() or None, "cpus": os.cpu_count()}


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"gpu": None, "gpus": 0}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_bytes": properties.total_memory,
        "gpu_multiprocessors": properties.multi_processor_count,
    }


def _torch_build() -> dict[str, Any]:
    import torch

    has_gpu = torch.cuda.is_available()
    cudnn = torch.backends.cudnn.version() if has_gpu else None  # type: ignore[no-untyped-call]
    return {"cuda": torch.version.cuda, "cudnn": cudnn}


def _look_up(environment: Environment, path: str) -> Any:
    group, _, name = path.partition(".")
    fields = getattr(environment, group)
    return fields.get(name) if name else fields
