"""From `--engine` and its options to a validated Engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from ndcheck.errors import UsageError, did_you_mean
from ndcheck.records import Engine, EngineName

TRANSFORMERS = "transformers"
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
ENGINE_DEFAULTS = Engine()
OWN_OPTIONS = {
    "model": "--model",
    "tokenizer": "--model",
    "dtype": "--dtype",
    "trust_remote_code": "--trust-remote-code",
    "tensor_parallel_size": "--tp",
    "pipeline_parallel_size": "--pp",
}
"""Arguments of the engine that have options of ndcheck's."""
FIXED_ARGUMENTS = ("skip_tokenizer_init", "data_parallel_size", "logprobs_mode")
NO_AUTO_LOADS = "--loads auto: with --engine vllm the memory is the engine's: give numbers"


def make_engine(name: str, tp: int, pp: int, arguments: Sequence[str]) -> Engine | None:
    """None for transformers. Raises UsageError naming the option that does not fit."""
    parsed = tuple(map(parse_engine_argument, arguments))
    if name == TRANSFORMERS:
        if (pp, parsed) != (1, ()):
            raise UsageError("--pp and --engine-arg are for an engine: give --engine vllm")
        return None
    if name not in ENGINES:
        known = (TRANSFORMERS, *ENGINES)
        raise UsageError(
            f"--engine: {name!r} is unknown; choose from {', '.join(known)}"
            f"{did_you_mean(name, known)}"
        )
    for option, value in (("--tp", tp), ("--pp", pp)):
        if value < 1:
            raise UsageError(f"{option} {value}: give 1 or more")
    names = [argument.partition("=")[0] for argument in parsed]
    for key in names:
        if names.count(key) > 1:
            raise UsageError(f"--engine-arg {key}: it is given twice")
    return Engine(name, tp, pp, parsed)


def parse_engine_argument(text: str) -> str:
    """``KEY=VALUE`` in the form that a spec holds."""
    key, equals, value = text.partition("=")
    key = key.strip().lstrip("-").replace("-", "_")
    if not equals or not key.isidentifier():
        raise UsageError(f"--engine-arg {text}: give KEY=VALUE, such as max_model_len=4096")
    if key in OWN_OPTIONS:
        raise UsageError(f"--engine-arg {key}: give {OWN_OPTIONS[key]} instead")
    if key in FIXED_ARGUMENTS:
        raise UsageError(f"--engine-arg {key}: ndcheck needs it as it is")
    return f"{key}={value.strip()}"
