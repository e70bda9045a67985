"""Check a model's directory without torch: the numbers in config.json, the headers of its shards.

A hub id passes unchecked: its files are not here yet.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from ndcheck.errors import UsageError

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
ACCEPTED = "(accepted: builtin, a directory with config.json and safetensors, or a hub id)"
JSON_FILES = (
    *(CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "special_tokens_map.json",
)
MOST_JSON_BYTES = 64 << 20
MOST_LAYERS = 1024
MOST_OF_A_SIZE = 1 << 20
LAYERS = re.compile(r"(^|_)n(um)?_.*(layer|block)s?$|^n_?layers?$|^depth$|layers?_(block_)?types?$")
SIZES = re.compile(r"hidden|inter|embd|embed_?dim|head|expert|ffn|inner|d_model|_dim|rank|width")
COUNTS = (
    *("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size"),
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim"),
    "max_position_embeddings",
)
"""Fields that are whole and positive where they are given at all."""


def check_config(source: str) -> None:
    """Raise UsageError where a directory's JSON files cannot be what a model is made from."""
    if (directory := _find(source)) is None:
        return
    if not (directory / CONFIG).exists():
        raise UsageError(f"--model {source}: it holds no {CONFIG} {ACCEPTED}")
    if (directory / "adapter_config.json").exists():
        raise UsageError(
            f"--model {source}: adapter_config.json makes it an adapter of another model: merge "
            "the two, and give the result"
        )
    for file in directory.glob("tokenizer*"):
        _check_regular(source, file)
    for name in JSON_FILES:
        if (directory / name).exists():
            document = _read_json(source, directory / name)
            if name == CONFIG:
                for reason in _odd_numbers(document):
                    raise UsageError(f"--model {source}: {name}: {reason}")


def count_weights(source: str) -> tuple[int, int] | None:
    """Tensors and elements in a directory's safetensors files; None for a hub id.

    Raises UsageError where a file is missing, broken, or outside the directory.
    """
    if (directory := _find(source)) is None:
        return None
    n_tensors = n_elements = 0
    for name, tensors in _shards(source, directory).items():
        shapes = _read_shapes(source, directory / name)
        if lacking := tensors - shapes.keys():
            raise UsageError(
                f"--model {source}: {INDEX} puts {min(lacking)} into {name}, which does not hold it"
            )
        n_tensors += len(shapes)
        n_elements += sum(shapes.values())
    return n_tensors, n_elements


def _find(source: str) -> Path | None:
    directory = Path(source)
    try:
        if not directory.is_dir():
            return None
        next(directory.iterdir(), None)
    except OSError as error:
        raise UsageError(f"--model {source}: {error.strerror}") from error
    return directory


def _broken(source: str, file: Path, reason: str) -> UsageError:
    return UsageError(f"--model {source}: {file.name}: {reason}")


def _check_regular(source: str, file: Path) -> None:
    """Raise UsageError for what is no file that can be read: a pipe would be waited for."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise _broken(source, file, "it is no regular file")
        file.open("rb").close()
    except OSError as error:
        raise _broken(source, file, error.strerror or str(error)) from error


def _read_json(source: str, file: Path) -> dict[str, Any]:
    _check_regular(source, file)
    if file.stat().st_size > MOST_JSON_BYTES:
        raise _broken(source, file, f"it has more than {MOST_JSON_BYTES >> 20} MiB")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(source, file, f"it holds no JSON: {error}") from error
    if not isinstance(document, dict):
        raise _broken(source, file, f"it holds a {type(document).__name__}, not an object")
    return document


def _odd_numbers(config: dict[str, Any]) -> Iterator[str]:
    """What no model of this config could be built with, or not in the memory of any machine."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from (f"{name}.{reason}" for reason in _odd_numbers(value))
        elif name in COUNTS and not isinstance(value, list | None):
            if not isinstance(value, int) or isinstance(value, bool):
                yield f"{name} is {value!r}: it must be a whole number"
            elif value < 1:
                yield f"{name} is {value}: it must be at least 1"
        n_layers = len(value) if isinstance(value, list) else value
        if LAYERS.search(name) and isinstance(n_layers, int) and n_layers > MOST_LAYERS:
            yield f"{name} is {n_layers} layers: at most {MOST_LAYERS} are accepted"
        elif SIZES.search(name) and isinstance(value, int) and value > MOST_OF_A_SIZE:
            yield f"{name} is {value}: at most {MOST_OF_A_SIZE} is accepted"


def _shards(source: str, directory: Path) -> dict[str, set[str]]:
    """The files that hold the weights, each with the tensors that the index says it has."""
    if (directory / WEIGHTS).exists():
        return {WEIGHTS: set()}
    index = directory / INDEX
    if not index.exists():
        raise UsageError(
            f"--model {source}: it has neither {WEIGHTS} nor {INDEX}: weights are read from "
            "safetensors only; --random-weights SEED measures a shape without any"
        )
    entries = _read_json(source, index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise _broken(source, index, "it has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, file in entries.items():
        if not str(file).endswith(".safetensors") or PurePath(str(file)).name != file:
            reason = f"{name} is in {file!r}, which is no file of this directory"
            raise _broken(source, index, reason)
        shards.setdefault(file, set()).add(name)
    return shards


def _read_shapes(source: str, file: Path) -> dict[str, int]:
    """Elements of every tensor in a safetensors file, whose head and length are consistent."""
    from safetensors import SafetensorError, safe_open

    _check_regular(source, file)
    try:
        with safe_open(file, framework="numpy") as weights:
            return {n: math.prod(weights.get_slice(n).get_shape()) for n in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(source, file, str(error).splitlines()[0]) from error
