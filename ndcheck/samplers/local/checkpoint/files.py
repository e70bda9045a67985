"""Check a model's directory: the numbers in config.json, and the headers of its shards.

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
ACCEPTED = (
    "(accepted: builtin, smollm2, a GGUF file, a directory with config.json and safetensors, or a "
    "hub id)"
)
JSON_FILES = (
    *(CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "special_tokens_map.json",
)
_FP8_NAMES = {"torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e8m0fnu": "F8_E8M0"}
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
    option = f"--model {source}"
    if (directory := find_directory(source, option)) is None:
        return
    if not (directory / CONFIG).exists():
        raise UsageError(f"--model {source}: it holds no {CONFIG} {ACCEPTED}")
    documents = check_files(directory, option)
    for reason in _odd_numbers(documents[CONFIG]):
        raise UsageError(f"{option}: {CONFIG}: {reason}")


def check_files(directory: Path, option: str) -> dict[str, dict[str, Any]]:
    """A directory's JSON files by name, all of them whole. Raises UsageError for ``option``."""
    for file in directory.glob("tokenizer*"):
        _check_regular(option, file)
    present = [name for name in JSON_FILES if (directory / name).exists()]
    return {name: read_json(option, directory / name) for name in present}


def count_elements(source: str) -> int | None:
    """The elements of all tensors in a directory's safetensors files; None for a hub id.

    Raises UsageError where a file is missing, broken, or outside the directory.
    """
    option = f"--model {source}"
    if (directory := find_directory(source, option)) is None:
        return None
    n_elements = 0
    for name, tensors in _shards(option, directory).items():
        shapes = read_shapes(option, directory / name)
        if lacking := tensors - shapes.keys():
            raise UsageError(
                f"{option}: {INDEX} puts {min(lacking)} into {name}, which does not hold it"
            )
        n_elements += sum(shapes.values())
    return n_elements


def read_dtypes(source: str) -> dict[str, str]:
    """The dtype of every tensor in a directory's safetensors files, as these name it ("F8_E4M3").

    None of a hub id. Raises UsageError as `count_elements` does.
    """
    from safetensors import safe_open

    option = f"--model {source}"
    dtypes: dict[str, str] = {}
    if (directory := find_directory(source, option)) is None:
        return {}
    for name in _shards(option, directory):
        with safe_open(directory / name, framework="numpy") as weights:
            dtypes |= {n: weights.get_slice(n).get_dtype() for n in weights.keys()}  # noqa: SIM118
    return dtypes


def find_zeros(source: str, names: set[str]) -> set[str]:
    """Which of these tensors in a directory's safetensors files are all zeros; none of a hub id."""
    from safetensors import safe_open

    option = f"--model {source}"
    zeros: set[str] = set()
    if not names or (directory := find_directory(source, option)) is None:
        return zeros
    for file in _shards(option, directory):
        with safe_open(directory / file, framework="pt") as weights:
            here = names.intersection(weights.keys())
            zeros |= {name for name in here if not weights.get_tensor(name).any()}
    return zeros


def can_hold(dtype: str, stored: str) -> bool:
    """Whether what safetensors calls ``stored`` are numbers of torch's ``dtype``, once rounded.

    Integers are codes, which mean nothing without scales; FP8 codes are rounded numbers already.
    """
    if "float8" in dtype:
        return stored == _FP8_NAMES.get(dtype)
    return "float" not in dtype or stored.startswith(("F", "BF"))


def find_directory(source: str, option: str) -> Path | None:
    """None where it is no directory. Raises UsageError for ``option`` where it cannot be read."""
    directory = Path(source)
    try:
        if not directory.is_dir():
            return None
        next(directory.iterdir(), None)
    except OSError as error:
        raise UsageError(f"{option}: {error.strerror}") from error
    return directory


def _broken(option: str, file: Path, reason: str) -> UsageError:
    return UsageError(f"{option}: {file.name}: {reason}")


def _check_regular(option: str, file: Path) -> None:
    """Raise UsageError for what is no file that can be read: a pipe would be waited for."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise _broken(option, file, "it is no regular file")
        file.open("rb").close()
    except OSError as error:
        raise _broken(option, file, error.strerror or str(error)) from error


def read_json(option: str, file: Path) -> dict[str, Any]:
    """An object. Raises UsageError for ``option``, naming the file."""
    _check_regular(option, file)
    if file.stat().st_size > MOST_JSON_BYTES:
        raise _broken(option, file, f"it has more than {MOST_JSON_BYTES >> 20} MiB")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(option, file, f"it holds no JSON: {error}") from error
    if not isinstance(document, dict):
        raise _broken(option, file, f"it holds a {type(document).__name__}, not an object")
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


def _shards(option: str, directory: Path) -> dict[str, set[str]]:
    """The files that hold the weights, each with the tensors that the index says it has."""
    if (directory / WEIGHTS).exists():
        return {WEIGHTS: set()}
    index = directory / INDEX
    if not index.exists():
        raise UsageError(
            f"{option}: it has neither {WEIGHTS} nor {INDEX}: weights are read from "
            "safetensors only; --random-weights SEED measures a shape without any"
        )
    entries = read_json(option, index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise _broken(option, index, "it has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, file in entries.items():
        if not str(file).endswith(".safetensors") or PurePath(str(file)).name != file:
            reason = f"{name} is in {file!r}, which is no file of this directory"
            raise _broken(option, index, reason)
        shards.setdefault(file, set()).add(name)
    return shards


def read_shapes(option: str, file: Path) -> dict[str, int]:
    """Elements of every tensor in a safetensors file, whose head and length are consistent."""
    from safetensors import SafetensorError, safe_open

    _check_regular(option, file)
    try:
        with safe_open(file, framework="numpy") as weights:
            return {n: math.prod(weights.get_slice(n).get_shape()) for n in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(option, file, str(error).splitlines()[0]) from error
