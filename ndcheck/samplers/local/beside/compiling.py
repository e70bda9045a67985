"""Triton's kernels, compiled in processes beside a run that imports and loads.

Most of a first run's start on a GPU is compiling, one kernel after the other, as trials meet them.
What these processes compile lies in Triton's cache by the time a launch looks there. Nothing else
comes from them: what they left out, or failed at, the run compiles itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib import metadata, util
from pathlib import Path
from typing import Any

from ndcheck.records import RunSpec
from ndcheck.samplers.local.beside.process import Parent, WorkerProcess
from ndcheck.samplers.local.checkpoint.files import CONFIG
from ndcheck.samplers.local.checkpoint.sources import find_source
from ndcheck.samplers.options import DTYPES
from ndcheck.storage.reading import parse_json, read_text

MOST_PROCESSES = 4
DRIVER = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
"""One of them is where an NVIDIA GPU can be used; torch, which would know, takes seconds."""
FUSED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of which the launches are known."""
MOST_FILLED = 16
"""Tokens that a neighbour's prompt may have beyond twice those of the probe's."""


@contextmanager
def compile_ahead(spec: RunSpec) -> Iterator[None]:
    """Compile what a run of a model in a directory will launch; the processes end with the block.

    Nothing is started where it has all been compiled, or where kernels are not known before.
    """
    with ExitStack() as stack:
        # A run that cannot do this, for whatever reason, only takes longer.
        with suppress(Exception):
            for message in _shares(spec):
                worker = WorkerProcess(__name__, "a process that compiled kernels")
                stack.enter_context(closing(worker)).send(message)
        yield


def _shares(spec: RunSpec) -> list[tuple[Any, ...]]:
    """What each process is to do, but for those that have done it."""
    n_shares = min(MOST_PROCESSES, len(os.sched_getaffinity(0)) - 2)
    is_known = spec.batching == "exact" and spec.kv_cache_dtype == "auto" and spec.draft is None
    if (
        n_shares < 1
        or "invariant" not in spec.arms
        or not is_known
        or spec.tensor_parallel > 1
        or not (spec.device == "auto" or spec.device.startswith("cuda"))
        or os.environ.get("TRITON_INTERPRET")
        or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        or metadata.version("torch").endswith("+cpu")
        or not any(path.exists() for path in DRIVER)
    ):
        return []
    directory = Path(find_source(spec).model)
    decoder = _decoder(parse_json(read_text(directory / CONFIG)), spec)
    if decoder is None:
        return []
    asked = (decoder, *_passes(spec))
    cache = _triton_cache()
    name = hashlib.sha256(json.dumps([asked, _versions()]).encode()).hexdigest()[:16]
    marks = [cache / f"ndcheck-{name}-{share}-of-{n_shares}" for share in range(n_shares)]
    return [
        (asked, spec.device, share, n_shares, str(mark))
        for share, mark in enumerate(marks)
        if not mark.exists()
    ]


def _decoder(config: Mapping[str, Any], spec: RunSpec) -> dict[str, Any] | None:
    """The fields of `ndcheck_kernels.measure.ahead.Decoder`, of a model with plain weights."""
    kind, heads, hidden = (
        config[key] for key in ("model_type", "num_attention_heads", "hidden_size")
    )
    if kind not in FUSED or (config.get("quantization_config") and not spec.dequantise):
        return None
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return {
        "hidden": hidden,
        "intermediate": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "vocabulary": config["vocab_size"],
        "dtype": DTYPES.get(spec.dtype, dtype),
        "has_qkv_bias": kind == "qwen2" or bool(config.get("attention_bias")),
        "has_qk_norm": kind == "qwen3",
    }


def _passes(spec: RunSpec) -> tuple[list[int], list[int], list[int]]:
    """Batch sizes, tokens of a pass, and columns of a cache, by what a token is in most text."""
    n_prompt = max((len(str(probe.content)) for probe in spec.probes), default=0) // 3 + 1
    new = spec.decoding.max_tokens
    short, long = n_prompt + new, 2 * n_prompt + MOST_FILLED + new
    lengths = {1, n_prompt, 2 * n_prompt + MOST_FILLED, *spec.widths}
    lengths |= {2**power for power in range(n_prompt.bit_length())}
    lengths |= {short, long} if "scoring" in spec.axes else set()
    return list(spec.batch_sizes or (1, 2, 4, 8, 16, 32)), sorted(lengths), [short, long]


def _versions() -> list[object]:
    """All that a compiled kernel may follow, and is known without torch: the GPU, the sources."""
    gpus = Path("/proc/driver/nvidia/gpus").glob("*/information")
    found = util.find_spec("ndcheck_kernels")
    assert found is not None
    assert found.origin is not None
    sources = sorted(Path(found.origin).parent.rglob("*.py"))
    return [
        *(metadata.version(package) for package in ("torch", "triton")),
        *(path.read_text().splitlines()[:1] for path in sorted(gpus)),
        *((str(path), stat.st_mtime_ns) for path in sources for stat in [path.stat()]),
    ]


def _triton_cache() -> Path:
    folder = os.environ.get("TRITON_CACHE_DIR")
    home = os.environ.get("TRITON_HOME") or Path.home()
    return Path(folder) if folder else Path(home) / ".triton" / "cache"


def main() -> None:
    """Compile the share of a run's kernels that the parent asks for."""
    asked, device, share, n_shares, mark = Parent().receive()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # What fails here, the run will say.
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return
    from ndcheck_kernels.measure import ahead

    where = torch.device("cuda" if device == "auto" else device)
    properties = torch.cuda.get_device_properties(where)
    decoder, *passes = asked
    ahead.compile_share(
        ahead.launches(ahead.Decoder(**decoder), *passes),
        share, n_shares, 10 * properties.major + properties.minor,
        properties.multi_processor_count,
    )  # fmt: skip
    Path(mark).touch()


if __name__ == "__main__":
    main()
