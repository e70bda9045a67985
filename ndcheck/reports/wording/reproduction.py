"""The command that repeats a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import PurePath

from ndcheck.plan.conversations import as_messages
from ndcheck.plan.prompts import STANDARD_INPUT
from ndcheck.ranks import program
from ndcheck.records import Endpoint, Engine, Probe, RunSpec

PROMPTS_FILE = "prompts.jsonl"
_MAX_PROMPTS = 4


def reproduce_command(spec: RunSpec, defaults: RunSpec, directory: str = "") -> str:
    """``ndcheck run`` with only the options that differ from the defaults.

    ``directory`` is the run's, which may hold the prompts: see `prompts_file`.
    """
    return " ".join((program(spec), *_options(spec, defaults, directory)))


def wrapped_command(spec: RunSpec, defaults: RunSpec, width: int, directory: str = "") -> list[str]:
    """The same over several lines that a shell still reads as one, where options fit the width."""
    lines = [program(spec)]
    for option in _options(spec, defaults, directory):
        if len(lines[-1]) + len(option) + 3 > width:
            lines[-1] += " \\"
            lines.append(" ")
        lines[-1] += f" {option}"
    return lines


def _options(spec: RunSpec, defaults: RunSpec, directory: str) -> list[str]:
    pairs: list[tuple[str, object, object]] = [
        ("--model", spec.model, defaults.model),
        ("--adapter", spec.adapter, defaults.adapter),
        *_engine_options(spec.engine),
        ("--tp", spec.tensor_parallel, defaults.tensor_parallel),
        ("--tp-groups", spec.tp_groups, defaults.tp_groups),
        *_endpoint_options(spec.endpoint),
        ("--loads", _commas(spec.batch_sizes) or "auto", _commas(defaults.batch_sizes)),
        ("--axes", _commas(spec.axes), _commas(defaults.axes)),
        ("--mode", spec.mode, defaults.mode),
        ("--batching", spec.batching, defaults.batching),
        ("--arrivals", spec.arrivals, defaults.arrivals),
        # A target rate chooses the number of samples.
        ("-n", None if spec.target_rate else spec.n_samples, defaults.n_samples),
        ("--max-tokens", spec.decoding.max_tokens, defaults.decoding.max_tokens),
        ("--temperature", spec.decoding.temperature, defaults.decoding.temperature),
        ("--seed", spec.seed, defaults.seed),
        ("--dtype", spec.dtype, defaults.dtype),
        ("--device", spec.device, defaults.device),
        ("--attn", spec.attention, defaults.attention),
        ("--kernels", None if spec.endpoint else _commas(spec.arms), _commas(defaults.arms)),
        ("--confidence", spec.confidence, defaults.confidence),
        ("--target-rate", spec.target_rate, defaults.target_rate),
        ("--random-weights", spec.random_weights, defaults.random_weights),
        ("--answer-pattern", spec.answer_pattern, defaults.answer_pattern),
    ]
    switches = [
        ("--chat", spec.chat),
        ("--trust-remote-code", spec.trust_remote_code),
        ("--stop-on-divergence", spec.stop_on_divergence),
        ("--allow-latent", spec.allow_latent),
    ]
    return [
        *(_prompts(spec.probes, directory) if spec.probes != defaults.probes else []),
        *(
            f"{name} {argument(str(value))}"
            for name, value, default in pairs
            if value is not None and value != default
        ),
        *(name for name, wanted in switches if wanted),
    ]


def _engine_options(engine: Engine | None) -> list[tuple[str, object, object]]:
    if engine is None:
        return []
    return [
        ("--engine", engine.name, None),
        ("--tp", engine.tensor_parallel, 1),
        ("--pp", engine.pipeline_parallel, 1),
        *(("--engine-arg", argument, None) for argument in engine.arguments),
    ]


def _endpoint_options(endpoint: Endpoint | None) -> list[tuple[str, object, object]]:
    """Header values are not known: their names show what to fill in."""
    if endpoint is None:
        return []
    defaults = Endpoint("")
    return [
        ("--endpoint", endpoint.url, defaults.url),
        ("--api-key-file", endpoint.api_key_file, defaults.api_key_file),
        *(("--header", f"{name}: VALUE", None) for name in endpoint.header_names),
        ("--arrival", endpoint.arrival, defaults.arrival),
        ("--fillers", endpoint.fillers, defaults.fillers),
        ("--timeout", f"{endpoint.timeout_s:g}", f"{defaults.timeout_s:g}"),
        ("--retries", endpoint.n_retries, defaults.n_retries),
    ]


def trusted_options(spec: RunSpec) -> list[tuple[str, str]]:
    """Options of a run that may run code, or say where and what is sent; a flag has no value."""
    found = []
    if spec.endpoint is not None:
        found.append(("--endpoint", spec.endpoint.url))
        if spec.endpoint.api_key_file is not None:
            found.append(("--api-key-file", spec.endpoint.api_key_file))
        found += [("--header", f"{name}: VALUE") for name in spec.endpoint.header_names]
    if spec.engine is not None:
        found += [("--engine-arg", argument) for argument in spec.engine.arguments]
    if "/" in spec.attention:  # A kernel of the hub's.
        found.append(("--attn", spec.attention))
    if spec.trust_remote_code:
        found.append(("--trust-remote-code", ""))
    return found


def shell_options(options: Iterable[tuple[str, str]]) -> str:
    """Options as a shell reads them."""
    return " ".join(f"{name} {argument(value)}" if value else name for name, value in options)


def resume_command(spec: RunSpec, directory: str) -> str:
    """The command that goes on with a run, with what only a command line may say."""
    trusted = shell_options(trusted_options(spec))
    return f"{program(spec)} --resume {argument(directory)} {trusted}".rstrip()


def prompts_file(spec: RunSpec, defaults: RunSpec) -> str | None:
    """What the file holds that the command names; None if the command names none."""
    if spec.probes == defaults.probes or _fit_options(spec.probes):
        return None
    lines = (
        {"id": probe.probe_id, "messages": as_messages(probe.messages)}
        if probe.messages
        else {"id": probe.probe_id, "prompt": probe.prompt}
        for probe in spec.probes
    )
    return "".join(json.dumps(line) + "\n" for line in lines)


def _prompts(probes: tuple[Probe, ...], directory: str) -> list[str]:
    if not _fit_options(probes):
        return [f"--prompts-file {argument(str(PurePath(directory, PROMPTS_FILE)))}"]
    return [f"--prompt {argument(probe.prompt)}" for probe in probes]


def _fit_options(probes: tuple[Probe, ...]) -> bool:
    """Ids have to be p1, p2, ..., which options get: the fillers' contents depend on them."""
    return (
        len(probes) <= _MAX_PROMPTS
        and not any("\0" in probe.prompt or probe.messages for probe in probes)
        and not any(probe.prompt == STANDARD_INPUT for probe in probes)
        and all(probe.probe_id == f"p{i}" for i, probe in enumerate(probes, 1))
    )


def _commas(values: Iterable[object]) -> str:
    return ",".join(map(str, values))


def argument(text: str) -> str:
    """A shell argument on one line without control characters; bash and zsh read it back."""
    if text.isprintable():
        return shlex.quote(text)
    return f"$'{''.join(map(_ansi_c, text))}'"


def _ansi_c(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    if character == "\n":
        return r"\n"
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x80 else f"\\U{code:08x}"
