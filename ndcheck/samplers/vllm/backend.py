"""``--engine vllm``: vLLM's offline engine, in processes of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from ndcheck.errors import UsageError
from ndcheck.records import Engine, InvariantBy, RunSpec
from ndcheck.samplers.backend import Backend
from ndcheck.samplers.endpoint.private import Private, is_secret_setting
from ndcheck.samplers.options import ENGINE, SCHEDULED, SCHEDULED_AXES, TP, Option, choice

if TYPE_CHECKING:
    from ndcheck.samplers.base import Sampler

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


def parse_engine_argument(text: str) -> str:
    """``KEY=VALUE`` in the form that a spec holds. Raises UsageError."""
    key, equals, value = text.partition("=")
    key = key.strip().lstrip("-").replace("-", "_")
    if not equals or not key.isidentifier():
        shown = key if equals else text
        raise UsageError(f"--engine-arg {shown}: give KEY=VALUE, such as max_model_len=4096")
    if key in OWN_OPTIONS:
        raise UsageError(f"--engine-arg {key}: give {OWN_OPTIONS[key]} instead")
    if key in FIXED_ARGUMENTS:
        raise UsageError(f"--engine-arg {key}: ndcheck needs it as it is")
    if is_secret_setting(key, value.strip()):
        raise UsageError(
            f"--engine-arg {key}: it would be recorded: give secrets in the environment, such as "
            "HF_TOKEN"
        )
    return f"{key}={value.strip()}"


def parse_engine_arguments(texts: str | Sequence[str]) -> tuple[str, ...]:
    """The same of one or several."""
    return tuple(map(parse_engine_argument, [texts] if isinstance(texts, str) else texts))


class EngineBackend(Backend):
    title = "vLLM"
    chosen_by = "--engine vllm"
    engine = "vllm"
    own = (
        replace(ENGINE, fields=("engine.name",)),
        replace(TP, fields=("engine.tensor_parallel",)),
        Option("pp", ("engine.pipeline_parallel",), 1),
        Option(
            "engine_arg",
            ("engine.arguments",),
            (),
            parse_engine_arguments,
            repeats=True,
            needs_trust=bool,
        ),
        Option(
            "invariant_by",
            ("engine.invariant_by",),
            "auto",
            choice("--invariant-by", InvariantBy),
        ),
        SCHEDULED,
    )
    takes = frozenset(
        {"dtype", "kernels", "random_weights", "trust_remote_code", "chat_template_kwargs"}
    )
    refusals: ClassVar = {
        "batching": "with --engine vllm a trial is one exact batch; measure its continuous "
        "batching with `vllm serve` and --endpoint",
        "device": "with --engine vllm choose by CUDA_VISIBLE_DEVICES",
        "kv_cache_dtype": "with --engine vllm give --engine-arg kv_cache_dtype=fp8 instead",
        "attn": "with --engine vllm give --engine-arg attention_backend=NAME instead",
    }

    def blank(self, defaults: RunSpec) -> RunSpec:
        return replace(defaults, engine=Engine(""), axes=SCHEDULED_AXES)

    def check(self, spec: RunSpec) -> None:
        engine = spec.engine or Engine()
        sizes = (("--tp", engine.tensor_parallel), ("--pp", engine.pipeline_parallel))
        for option, value in sizes:
            if value < 1:
                raise UsageError(f"{option} {value}: give 1 or more")
        names = [argument.partition("=")[0] for argument in engine.arguments]
        for key in names:
            if names.count(key) > 1:
                raise UsageError(f"--engine-arg {key}: it is given twice")
        if not spec.batch_sizes:
            raise UsageError(NO_AUTO_LOADS)

    def open(
        self,
        spec: RunSpec,
        *,
        load_weights: bool,
        private: Private,
        say: Callable[[str], None],
    ) -> Sampler:
        from ndcheck.samplers.local.checkpoint.sources import find_source

        find_source(spec)  # Before torch is imported, which takes seconds.
        from ndcheck.samplers.vllm.sampler import EngineSampler

        return EngineSampler(spec, spec.engine or Engine(), load_weights=load_weights)

    def unseen(self, spec: RunSpec) -> str | None:
        return f"{spec.model} runs in {self.engine}: no op can be seen there"
