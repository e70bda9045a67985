"""From what a user typed to a RunSpec; everything wrong with it is one clear line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, get_args
from urllib.parse import urlsplit

from ndcheck.engine_request import ENGINE_DEFAULTS, NO_AUTO_LOADS, TRANSFORMERS, make_engine
from ndcheck.errors import UsageError, did_you_mean
from ndcheck.plan.arrivals import parse_arrival
from ndcheck.plan.prompts import STANDARD_INPUT, read_prompts, read_standard_input
from ndcheck.plan.prompts.entries import Entry
from ndcheck.plan.queue import check_arrivals
from ndcheck.plan.size import MAX_BATCH_SIZE, check_size
from ndcheck.ranks import check_request
from ndcheck.records import (
    ARMS,
    AXES,
    Arm,
    Axis,
    Batching,
    Decoding,
    Endpoint,
    Fillers,
    Mode,
    Probe,
    Prompt,
    RunSpec,
)
from ndcheck.storage.reading import is_unicode

DEFAULTS = RunSpec(
    model="builtin",
    probes=(Probe("p1", "class Queue:"),),
    decoding=Decoding(max_tokens=100),
    batch_sizes=(1, 2, 4, 8, 16),
    axes=AXES,
    mode="copies",
    n_samples=150,
    arms=("stock", "invariant"),
)

ENDPOINT_DEFAULTS = Endpoint("")

Name = TypeVar("Name", bound=str)


def make_spec(
    *,
    model: str = DEFAULTS.model,
    adapter: Path | None = None,
    prompt: str | Sequence[str] = (),
    prompts_file: Path | None = None,
    prompt_column: str | None = None,
    chat: bool = DEFAULTS.chat,
    loads: str | Sequence[int] = DEFAULTS.batch_sizes,
    axes: str | Sequence[str] = DEFAULTS.axes,
    mode: str = DEFAULTS.mode,
    batching: str = DEFAULTS.batching,
    arrivals: str = DEFAULTS.arrivals,
    kernels: str | Sequence[str] | None = None,
    samples: int = DEFAULTS.n_samples,
    target_rate: float | None = DEFAULTS.target_rate,
    confidence: float = DEFAULTS.confidence,
    stop_on_divergence: bool = DEFAULTS.stop_on_divergence,
    allow_latent: bool = DEFAULTS.allow_latent,
    max_tokens: int = DEFAULTS.decoding.max_tokens,
    temperature: float = DEFAULTS.decoding.temperature,
    seed: int = DEFAULTS.seed,
    dtype: str = DEFAULTS.dtype,
    device: str = DEFAULTS.device,
    attn: str = DEFAULTS.attention,
    answer_pattern: str | None = DEFAULTS.answer_pattern,
    random_weights: int | None = DEFAULTS.random_weights,
    trust_remote_code: bool = DEFAULTS.trust_remote_code,
    engine: str = TRANSFORMERS,
    tp: int = DEFAULTS.tensor_parallel,
    tp_groups: int | None = DEFAULTS.tp_groups,
    pp: int = ENGINE_DEFAULTS.pipeline_parallel,
    engine_arg: str | Sequence[str] = (),
    endpoint: str | None = None,
    arrival: str = ENDPOINT_DEFAULTS.arrival,
    fillers: str = ENDPOINT_DEFAULTS.fillers,
    timeout: float = ENDPOINT_DEFAULTS.timeout_s,
    retries: int = ENDPOINT_DEFAULTS.n_retries,
    api_key_file: Path | None = None,
) -> RunSpec:
    """The spec that these options ask for: those of `ndcheck run`, by the names they have there.

    `ndcheck.measure` and the checks of a configuration file take the same ones; the annotations
    say what a file may hold. Raises UsageError naming the option that is wrong.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    probes = make_probes(prompts, prompts_file, prompt_column)
    spec = RunSpec(
        model=model,
        probes=probes,
        decoding=Decoding(max_tokens, temperature, seed),
        batch_sizes=parse_loads(_join(loads)),
        axes=parse_axes(_join(axes)),
        mode=parse_mode(mode),
        batching=parse_batching(batching),
        arrivals=arrivals,
        n_samples=samples,
        arms=parse_arms(
            None if kernels is None else _join(kernels), model, is_served=endpoint is not None
        ),
        seed=seed,
        dtype=dtype,
        device=device,
        attention=attn,
        adapter=None if adapter is None else str(adapter),
        chat=chat or all(probe.messages for probe in probes),
        trust_remote_code=trust_remote_code,
        random_weights=random_weights,
        target_rate=target_rate,
        confidence=confidence,
        stop_on_divergence=stop_on_divergence,
        allow_latent=allow_latent,
        answer_pattern=answer_pattern,
        tensor_parallel=tp if engine == TRANSFORMERS else DEFAULTS.tensor_parallel,
        tp_groups=tp_groups,
        engine=make_engine(
            engine, tp, pp, [engine_arg] if isinstance(engine_arg, str) else engine_arg
        ),
        endpoint=make_endpoint(endpoint, api_key_file, arrival, fillers, timeout, retries),
    )
    check(spec)
    return spec


def _join(values: str | Sequence[object]) -> str:
    return values if isinstance(values, str) else ",".join(map(str, values))


def parse_loads(text: str) -> tuple[int, ...]:
    """Batch sizes as `parse_batch_sizes` reads them; none yet for ``auto``."""
    return () if text == "auto" else parse_batch_sizes(text)


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """``"1,2,4"`` as batch sizes. Raises UsageError on anything but distinct numbers >= 1."""
    sizes: list[int] = []
    for part in text.split(","):
        part = part.strip()
        if not part.isdecimal() or not part.strip("0"):
            raise UsageError(f"--loads: {part!r} is not a batch size; give numbers of 1 or more")
        if len(part.lstrip("0")) > len(str(MAX_BATCH_SIZE)):
            raise UsageError(f"--loads {part:.20}: a batch has at most {MAX_BATCH_SIZE} rows")
        if int(part) in sizes:
            raise UsageError(f"--loads: {int(part)} is given twice")
        sizes.append(int(part))
    return tuple(sizes)


def parse_axes(text: str) -> tuple[Axis, ...]:
    """``"slot,cache"`` as invariance properties, in their usual order; ``all`` for every one."""
    return AXES if text == "all" else parse_names("--axes", text, AXES)


def parse_arms(text: str | None, model: str, *, is_served: bool = False) -> tuple[Arm, ...]:
    """``"stock,invariant"`` as kernel sets; None is both, where the model computes here.

    A served model has one, whatever it is. Raises UsageError where another is asked for.
    """
    if text is None:
        return ("stock",) if is_served or model.startswith("scripted:") else DEFAULTS.arms
    arms = parse_names("--kernels", text, ARMS)
    if is_served and arms != ("stock",):
        raise UsageError(f"--kernels {text}: with --endpoint this is the server's own to choose")
    return arms


def parse_mode(text: str) -> Mode:
    """``copies`` or ``mixed``."""
    for mode in get_args(Mode):
        if text == mode:
            return mode  # type: ignore[no-any-return]
    raise UsageError(f"--mode {text}: choose from {', '.join(get_args(Mode))}")


def parse_batching(text: str) -> Batching:
    """``exact`` or ``continuous``."""
    for batching in get_args(Batching):
        if text == batching:
            return batching  # type: ignore[no-any-return]
    raise UsageError(f"--batching {text}: choose from {', '.join(get_args(Batching))}")


def make_probes(
    prompts: Sequence[str], file: Path | None, column: str | None = None
) -> tuple[Probe, ...]:
    """Probes p1, p2, ... from prompts given one by one and from a file.

    ``-`` stands for all of standard input as one prompt, or as the file; the file is read by
    `ndcheck.plan.prompts.read_prompts`. Raises UsageError for an empty prompt, a repeated id, or
    a file that cannot be read.
    """
    if [*prompts, str(file)].count(STANDARD_INPUT) > 1:
        raise UsageError(f"--prompt, --prompts-file: {STANDARD_INPUT} can be read once only")
    if column is not None and file is None:
        raise UsageError("--prompt-column: this is for a file: give --prompts-file")
    entries: list[Entry] = [
        (None, _read_prompt_from_input() if prompt == STANDARD_INPUT else prompt)
        for prompt in prompts
    ]
    if file is not None:
        entries += read_prompts(file, column)
    if file is None and not prompts:
        return DEFAULTS.probes
    probes = [_make_probe(name or f"p{i}", prompt) for i, (name, prompt) in enumerate(entries, 1)]
    if not probes:
        raise UsageError(f"--prompts-file {file}: it holds no prompt")
    for probe in probes:
        if not probe.prompt.strip():
            raise UsageError(f"prompt {probe.probe_id} is empty")
        if not is_unicode(probe.prompt):
            raise UsageError(f"prompt {probe.probe_id} is not valid UTF-8")
    if len({probe.probe_id for probe in probes}) < len(probes):
        raise UsageError(f"--prompts-file {file}: two prompts have the same id")
    return tuple(probes)


def _make_probe(probe_id: str, prompt: Prompt) -> Probe:
    if isinstance(prompt, str):
        return Probe(probe_id, prompt)
    return Probe(probe_id, prompt[-1].content, prompt)


def _read_prompt_from_input() -> str:
    try:
        text = read_standard_input().decode("utf-8")
    except ValueError as error:
        raise UsageError(f"--prompt {STANDARD_INPUT}: {error}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _check_for_engine(spec: RunSpec) -> None:
    if spec.endpoint is not None:
        raise UsageError(
            "--engine: with --endpoint the server has its engine already; give one of the two"
        )
    if not spec.batch_sizes:
        raise UsageError(NO_AUTO_LOADS)
    if spec.batching != DEFAULTS.batching:
        raise UsageError(
            f"--batching {spec.batching}: with --engine vllm a trial is one exact batch; measure "
            "its continuous batching with `vllm serve` and --endpoint"
        )
    if spec.model.startswith("scripted:"):
        raise UsageError(f"--engine: vLLM cannot compute {spec.model}")
    if spec.device != DEFAULTS.device:
        raise UsageError("--device: with --engine vllm choose by CUDA_VISIBLE_DEVICES")
    if spec.attention != DEFAULTS.attention:
        raise UsageError(
            "--attn: with --engine vllm give --engine-arg attention_backend=NAME instead"
        )


def parse_headers(headers: Sequence[str]) -> dict[str, str]:
    """``"Name: value"`` lines by name. Raises UsageError without repeating a value."""
    parsed = {}
    for header in headers:
        name, colon, value = header.partition(":")
        if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name.strip()):
            raise UsageError("--header: give it as 'Name: value'")
        if not value.strip().isascii() or not value.strip().isprintable():
            raise UsageError(f"--header {name.strip()}: the value holds characters HTTP refuses")
        parsed[name.strip()] = value.strip()
    return parsed


def add_headers(spec: RunSpec, headers: Mapping[str, str]) -> RunSpec:
    """``spec`` with the names of the headers, whose values no record holds."""
    if not headers:
        return spec
    if spec.endpoint is None:
        raise UsageError("--header: this is for a server: give --endpoint")
    return replace(spec, endpoint=replace(spec.endpoint, header_names=tuple(headers)))


def make_endpoint(
    url: str | None,
    api_key_file: Path | None,
    arrival: str,
    fillers: str,
    timeout_s: float,
    n_retries: int,
) -> Endpoint | None:
    """None without a URL. Raises UsageError naming the option that does not fit."""
    kinds: tuple[Fillers, ...] = get_args(Fillers)
    if fillers not in kinds:
        raise UsageError(f"--fillers {fillers}: choose from {', '.join(kinds)}")
    endpoint = Endpoint(
        url=url or "",
        api_key_file=None if api_key_file is None else str(api_key_file),
        arrival=arrival,
        fillers=fillers,
        timeout_s=timeout_s,
        n_retries=n_retries,
    )
    if url is None:
        if endpoint != ENDPOINT_DEFAULTS:
            raise UsageError(
                "--endpoint: give a server's address, since --arrival, --fillers, --timeout, "
                "--retries and --api-key-file are for one"
            )
        return None
    return endpoint


def _check_endpoint(endpoint: Endpoint) -> None:
    try:
        parts = urlsplit(endpoint.url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        has_secret = bool("@" in endpoint.url or parts.query or parts.fragment)
        is_address = is_address and (parts.port is None or parts.port > 0)
    except ValueError:
        is_address = has_secret = False
    if has_secret:
        raise UsageError(
            "--endpoint: leave out user, password and query, which would be recorded: give a key "
            "in NDCHECK_API_KEY or with --api-key-file, other secrets with --header"
        )
    if not is_address or not endpoint.url.isprintable():
        # Not repeated: an address that cannot be read may hold a password anywhere.
        raise UsageError(
            "--endpoint: give the address of an OpenAI API, such as http://127.0.0.1:8000/v1"
        )
    if parse_arrival(endpoint.arrival) is None:
        raise UsageError(
            f"--arrival {endpoint.arrival}: give together, closed, poisson:RATE (a second) or "
            "bursts:SIZE:SECONDS"
        )
    if not 0 < endpoint.timeout_s < float("inf"):
        raise UsageError(f"--timeout {endpoint.timeout_s}: give a positive number of seconds")
    if endpoint.n_retries < 0:
        raise UsageError(f"--retries {endpoint.n_retries}: give 0 or more")


def check(spec: RunSpec) -> None:
    """Raise UsageError naming the option that is out of range."""
    decoding = spec.decoding
    texts = (spec.model, spec.adapter or "", spec.device, spec.attention, spec.answer_pattern or "")
    checks = (
        *((is_unicode(text), f"{text!r} is not valid UTF-8") for text in texts),
        (spec.n_samples >= 1, f"--samples {spec.n_samples}: give 1 or more"),
        (decoding.max_tokens >= 1, f"--max-tokens {decoding.max_tokens}: give 1 or more"),
        (
            0 <= decoding.temperature < float("inf"),
            f"--temperature {decoding.temperature}: give 0 (greedy) or a positive number",
        ),
        (
            spec.random_weights is None or 0 <= spec.random_weights < 2**63,
            f"--random-weights {spec.random_weights}: give a seed, 0 up to 2^63 - 1",
        ),
        (0 <= spec.seed < 2**63, f"--seed {spec.seed}: give 0 up to 2^63 - 1"),
        (
            spec.target_rate is None or 0 < spec.target_rate < 1,
            f"--target-rate {spec.target_rate}: give a rate between 0 and 1, such as 0.01",
        ),
        (
            0 < spec.confidence < 1,
            f"--confidence {spec.confidence}: give a level between 0 and 1, such as 0.95",
        ),
    )
    for is_fine, message in checks:
        if not is_fine:
            raise UsageError(message)
    if not spec.chat and any(probe.messages for probe in spec.probes):
        raise UsageError("--prompts-file: some prompts are conversations: add --chat")
    check_size(spec)
    check_arrivals(spec.arrivals)
    if spec.batching == "exact" and spec.arrivals != DEFAULTS.arrivals:
        raise UsageError(f"--arrivals {spec.arrivals} needs --batching continuous")
    if spec.batching == "continuous" and spec.model.startswith("scripted:"):
        raise UsageError("--batching continuous needs a model that computes, not scripted:NAME")
    check_request(spec)
    if spec.adapter is not None and spec.model.startswith("scripted:"):
        raise UsageError("--adapter needs a model that computes, not scripted:NAME")
    if spec.engine is not None:
        _check_for_engine(spec)
    if spec.endpoint is not None:
        _check_for_server(spec, spec.endpoint)
    if spec.answer_pattern is not None:
        from ndcheck.analysis.metrics import compile_answer_pattern

        compile_answer_pattern(spec.answer_pattern)


def _check_for_server(spec: RunSpec, endpoint: Endpoint) -> None:
    _check_endpoint(endpoint)
    if spec.model == DEFAULTS.model:
        raise UsageError("--endpoint: give the name of a served model as --model")
    if not spec.batch_sizes:
        raise UsageError("--loads auto: with --endpoint the memory is the server's: give numbers")
    for option, value, default in (
        ("--dtype", spec.dtype, DEFAULTS.dtype),
        ("--device", spec.device, DEFAULTS.device),
        ("--attn", spec.attention, DEFAULTS.attention),
        ("--batching", spec.batching, DEFAULTS.batching),
        ("--random-weights", spec.random_weights, DEFAULTS.random_weights),
        ("--adapter", spec.adapter, DEFAULTS.adapter),
        ("--trust-remote-code", spec.trust_remote_code, DEFAULTS.trust_remote_code),
    ):
        if value != default:
            raise UsageError(f"{option}: with --endpoint this is the server's own to choose")


def parse_names(option: str, text: str, accepted: tuple[Name, ...]) -> tuple[Name, ...]:
    """``"a,b"`` as names of ``accepted``, in its order. Raises UsageError for any other."""
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in accepted:
            raise UsageError(
                f"{option}: {name!r} is unknown; choose from {', '.join(accepted)}"
                f"{did_you_mean(name, accepted)}"
            )
    return tuple(name for name in accepted if name in names)
