"""Where a model's files are, from what a user named, before torch is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ndcheck.builtin import MODEL_DIRECTORY
from ndcheck.errors import UsageError
from ndcheck.records import RunSpec
from ndcheck.samplers.local.checkpoint import smollm2
from ndcheck.samplers.local.checkpoint.adapters import CONFIG as ADAPTER_CONFIG
from ndcheck.samplers.local.checkpoint.adapters import read_adapter
from ndcheck.samplers.local.checkpoint.files import CONFIG, check_config, find_directory
from ndcheck.samplers.local.checkpoint.gguf_file import SUFFIX, find_gguf, read_gguf_head
from ndcheck.samplers.local.checkpoint.hub import check_hub
from ndcheck.storage.reading import exists

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Source:
    """A directory, a GGUF file or a hub id, and the directory of an adapter."""

    name: str
    model: str
    adapter: Path | None = None

    @property
    def tokenizer(self) -> str:
        """The adapter's own, where it was saved with one."""
        has_own = self.adapter is not None and (self.adapter / "tokenizer_config.json").exists()
        return str(self.adapter) if has_own else self.model

    def describe(self) -> dict[str, str]:
        """The model's name, and the adapter and the base where it has them."""
        if self.adapter is None:
            return {"name": self.name}
        return {"name": self.name, "base": self.model, "adapter": str(self.adapter)}


def find_source(spec: RunSpec) -> Source:
    """Raises UsageError where files are missing, not what they should be, or of no use here."""
    source = _find_source(spec)
    is_plain = source.adapter is None and not source.model.endswith(SUFFIX)
    if source.adapter is not None and spec.random_weights is not None:
        raise UsageError("--random-weights: an adapter needs the weights of its base")
    if spec.tensor_parallel > 1 and not is_plain:
        raise UsageError(
            f"--tp {spec.tensor_parallel}: processes share safetensors only: save the GGUF file, "
            "or the merged adapter, as that"
        )
    if spec.engine is not None and not is_plain:
        raise UsageError(
            f"--engine {spec.engine.name}: give a directory of safetensors as --model, or serve "
            "the GGUF file or the adapter and give --endpoint"
        )
    return source


def _find_source(spec: RunSpec) -> Source:
    option = f"--model {spec.model}"
    if spec.adapter is not None:
        adapter = Path(spec.adapter)
        read_adapter(adapter)
        return Source(spec.model, _find_base(spec.model), adapter)
    directory = find_directory(spec.model, option)
    if directory is None or not (directory / ADAPTER_CONFIG).exists():
        return Source(spec.model, _find_base(spec.model))
    base = read_adapter(directory)
    if base is None or (find_directory(base, option) is None and not HUB_ID.fullmatch(base)):
        named = base or "a model that it does not name"
        raise UsageError(
            f"{option}: it is an adapter of {named}, which is not here: give that as --model, and "
            f"--adapter {spec.model}"
        )
    if spec.trust_remote_code:
        raise UsageError(
            f"--trust-remote-code: the adapter chose its base, {base}: give that as --model, and "
            f"--adapter {spec.model}"
        )
    return Source(spec.model, _find_base(base), directory)


def _find_base(model: str) -> str:
    """A directory, a GGUF file or a hub id, checked."""
    if model == "builtin":
        return str(MODEL_DIRECTORY)
    if model == smollm2.NAME:
        return str(smollm2.find_model())
    directory = find_directory(model, f"--model {model}")
    if directory is not None and (directory / ADAPTER_CONFIG).exists():
        raise UsageError(f"--model {model}: it is an adapter, and no model of its own")
    file = Path(model) if model.endswith(SUFFIX) and directory is None else None
    if directory is not None and not (directory / CONFIG).exists():
        file = find_gguf(directory)
    elif directory is None and file is None and exists(Path(model)):
        raise UsageError(
            f"--model {model}: it is a file: give the directory of a model, or for a GGUF file a "
            f"name that ends in {SUFFIX} (a link will do)"
        )
    if file is not None:
        read_gguf_head(file)
        return str(file)
    if directory is None:
        check_hub(model)
    check_config(model)
    return model
