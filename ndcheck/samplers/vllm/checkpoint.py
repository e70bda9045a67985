"""The checkpoint that an engine loads: found, written from a seed, and told from others."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ndcheck.errors import BackendError
from ndcheck.records import RunSpec

N_DIGEST_BLOCKS = 4096
DIGEST_BLOCK_BYTES = 64


def random_checkpoint(source: str, config: Any, spec: RunSpec) -> Path:
    """A directory with the weights that ``spec.random_weights`` seeds, written once.

    They are those that the transformers engine makes from the same seed on the same device, and
    stay in ``$XDG_CACHE_HOME/ndcheck``. Raises BackendError if the disk refuses.
    """
    import torch

    from ndcheck.samplers.local.device import choose_device
    from ndcheck.samplers.local.loading import load_model

    device = choose_device("auto")
    identity = f"{config.to_json_string()}/{spec.random_weights}/{spec.dtype}/{device.type}"
    name = hashlib.blake2b(f"{identity}/{torch.__version__}".encode(), digest_size=8).hexdigest()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    checkpoint = caches / "ndcheck" / "checkpoints" / name
    if checkpoint.is_dir():
        return checkpoint
    model = load_model(source, config, spec, device)
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=checkpoint.parent, prefix=f".{name}."))
        try:
            model.save_pretrained(unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(checkpoint)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except OSError as error:
        raise BackendError(
            f"cannot write random weights to {checkpoint}: {error.strerror or error}"
        ) from error
    finally:
        # The engines need the memory.
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return checkpoint


def digest_checkpoint(directory: Path) -> str:
    """16 hexadecimal digits over the sizes of the weight files and evenly spaced parts of them."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:
            # The head names every tensor with its shape and dtype.
            digest.update(weights.read(1 << 16))
            for i in range(N_DIGEST_BLOCKS):
                weights.seek(size * i // N_DIGEST_BLOCKS)
                digest.update(weights.read(DIGEST_BLOCK_BYTES))
    return digest.hexdigest()


def find_checkpoint(source: str) -> Path | None:
    """The local directory of a model, also of one from the hub; None if it is not stored here."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
