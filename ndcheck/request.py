"""From what a user typed to a RunSpec; everything wrong with it is one clear line."""

from __future__ import annotations

import numbers
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args, get_type_hints

from ndcheck.errors import UsageError, did_you_mean
from ndcheck.plan.coverage import OF_BATCHES, lacks_batches
from ndcheck.plan.prompts import read_prompts
from ndcheck.plan.prompts.entries import Entry
from ndcheck.plan.size import check_size
from ndcheck.probe import Message
from ndcheck.records import Probe, RunSpec
from ndcheck.samplers import options
from ndcheck.samplers.backends import (
    OPTIONS,
    backend_of,
    choose,
    refuse_other_fields,
    refuse_others,
)
from ndcheck.samplers.endpoint.private import (
    Private,
    parse_extra_body,
    parse_headers,
    parse_query,
)
from ndcheck.storage.reading import is_unicode

DEFAULTS = options.DEFAULTS
parse_names = options.parse_names


class Options(TypedDict, total=False):
    """Those of `ndcheck run`, by the names they have there.

    The annotations say what a configuration file may hold. ``arrival`` is the old name of
    ``arrivals`` for a server.
    """

    model: str
    adapter: Path | None
    prompt: str | Sequence[str] | None
    prompts_file: Path | None
    prompt_column: str | None
    system: str | None
    chat: bool
    chat_template_kwargs: str | dict[str, Any] | None
    loads: str | Sequence[int]
    axes: str | Sequence[str]
    widths: str | Sequence[int] | None
    draft: str | None
    mode: str
    batching: str
    arrivals: str | None
    kernels: str | Sequence[str] | None
    samples: int
    target_rate: float | None
    confidence: float
    stop_on_divergence: bool
    allow_latent: bool
    max_tokens: int
    temperature: float
    seed: int
    dtype: str
    device: str
    attn: str
    answer: str | None
    answer_pattern: str | None
    random_weights: int | None
    dequantise: bool
    kv_cache_dtype: str
    trust_remote_code: bool
    engine: str
    tp: int
    tp_groups: int | None
    pp: int
    engine_arg: str | Sequence[str]
    invariant_by: str
    endpoint: str | None
    arrival: str | None
    fillers: str
    timeout: float
    retries: int
    query: str | Sequence[str]
    extra_body: str | dict[str, Any] | None
    no_temperature: bool
    stop: str | Sequence[str]
    api_key_file: Path | None


def make_spec(**given: Unpack[Options]) -> RunSpec:
    """The spec that these options ask for; the others have their defaults.

    `ndcheck.measure` and the checks of a configuration file take the same ones. Raises UsageError
    naming the option that is wrong.
    """
    known = Options.__annotations__
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise UsageError(f"there is no option {unknown!r}{did_you_mean(unknown, known)}")
    typed = {name: row.default for name, row in OPTIONS.items() if name in known}
    typed |= {name: _as_annotated(name, value) for name, value in given.items()}
    arrival = typed.pop("arrival", None)
    if arrival is not None:
        if typed["arrivals"] not in (None, arrival):
            raise UsageError("--arrival is the old name of --arrivals: give the latter alone")
        typed["arrivals"] = arrival
    backend = choose(typed["model"], typed["engine"], is_served=typed["endpoint"] is not None)
    refuse_others(backend, typed)
    backend.check_given(typed)
    spec = backend.blank(DEFAULTS)
    for option in backend.options:
        if option.name in typed:
            spec = option.put(spec, option.parse(typed[option.name]))
    prompts, file = typed["prompt"], typed["prompts_file"]
    if prompts is not None and not prompts and file is None and not isinstance(prompts, str):
        # As what is left of a list that was filtered: another prompt in its place would pass.
        raise UsageError("--prompt: the list is empty; without --prompt there is a default one")
    prompts = [prompts] if isinstance(prompts, str) else prompts or ()
    probes = make_probes(prompts, file, typed["prompt_column"])
    if typed["system"] is not None:
        probes = tuple(_with_system(probe, typed["system"]) for probe in probes)
    is_chat = typed["chat"] or all(probe.messages for probe in probes)
    spec = replace(spec, probes=probes, chat=is_chat)
    check(spec)
    return spec


_HINTS = get_type_hints(Options)


def _as_annotated(name: str, value: Any) -> Any:
    """A path that is given as text, a number of numpy's, as what the option takes.

    Raises UsageError for what is none of it.
    """
    hint = _HINTS[name]
    kinds = get_args(hint) or (hint,)
    is_text = isinstance(value, str | os.PathLike)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if isinstance(value, bool | None) and type(value) in kinds:
        return value
    if bool in kinds:
        words = "True or False"
    elif int in kinds:
        if is_number and isinstance(value, numbers.Integral):
            return int(value)
        words = "a whole number"
    elif float in kinds:
        if is_number:
            return value if isinstance(value, int | float) else float(value)
        words = "a number"
    elif Path in kinds:
        if is_text:
            return Path(value)
        words = "a path"
    elif is_text:
        return os.fspath(value)
    else:
        has_items = any(map(get_args, kinds))
        if has_items and isinstance(value, Iterable) and not isinstance(value, bytes):
            return value if isinstance(value, Mapping | list | tuple) else list(value)
        words = "text or a list" if has_items else "text"
    raise UsageError(f"--{name.replace('_', '-')} {value!r:.80}: give {words}")


def make_probes(
    prompts: Sequence[str], file: Path | None, column: str | None = None
) -> tuple[Probe, ...]:
    """Probes p1, p2, ... from prompts given one by one and from a file.

    The file is read by `ndcheck.plan.prompts.read_prompts`. Raises UsageError for an empty prompt,
    a repeated id, or a file that cannot be read.
    """
    if column is not None and file is None:
        raise UsageError("--prompt-column: this is for a file: give --prompts-file")
    entries = [Entry(None, prompt) for prompt in prompts]
    if file is not None:
        entries += read_prompts(file, column)
    if file is None and not prompts:
        return DEFAULTS.probes
    probes = [_make_probe(entry, f"p{i}") for i, entry in enumerate(entries, 1)]
    if not probes:
        raise UsageError(f"--prompts-file {file}: it holds no prompt")
    for probe in probes:
        if not probe.prompt.strip():
            raise UsageError(f"prompt {probe.probe_id} is empty")
        if not is_unicode(probe.prompt) or not is_unicode(probe.answer or ""):
            raise UsageError(f"prompt {probe.probe_id} is not valid UTF-8")
    twice = [name for name, n in Counter(probe.probe_id for probe in probes).items() if n > 1]
    if twice:
        raise UsageError(f"--prompts-file {file}: two prompts have the same id, {twice[0]!r:.80}")
    return tuple(probes)


def _make_probe(entry: Entry, default_id: str) -> Probe:
    probe_id, prompt = entry.name or default_id, entry.prompt
    if isinstance(prompt, str):
        return Probe(probe_id, prompt, answer=entry.answer)
    return Probe(probe_id, prompt[-1].content, prompt, entry.answer)


def _with_system(probe: Probe, system: str) -> Probe:
    """The probe as a conversation that begins with a system prompt; its own stays, if it has one.

    Raises UsageError where that is no text.
    """
    if not system.strip() or not is_unicode(system):
        raise UsageError("--system: give a text that is valid UTF-8 and not empty")
    messages = probe.messages or (Message("user", probe.prompt),)
    if messages[0].role in ("system", "developer"):
        return probe
    return replace(probe, messages=(Message("system", system), *messages))


def make_private(
    headers: Sequence[str],
    query: str | Sequence[str] = (),
    extra_body: str | Mapping[str, Any] | None = None,
) -> Private:
    """What goes with every request, as given. Raises UsageError without repeating a secret."""
    return Private(parse_headers(headers), parse_query(query), parse_extra_body(extra_body))


def add_headers(spec: RunSpec, headers: Mapping[str, str]) -> RunSpec:
    """``spec`` with the names of the headers, whose values no record holds."""
    if not headers:
        return spec
    refuse_others(backend_of(spec), {"header": headers})
    return OPTIONS["header"].put(spec, tuple(headers))


def check(spec: RunSpec) -> None:
    """Raise UsageError naming the option that is out of range."""
    decoding = spec.decoding
    texts = (spec.model, spec.adapter, spec.draft, spec.device, spec.attention, spec.answer_pattern)
    checks = (
        *((is_unicode(text), f"{text!r} is not valid UTF-8") for text in texts if text),
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
    if spec.widths != options.parse_widths(spec.widths):
        raise UsageError(f"--widths {options.join(spec.widths)}: give them in ascending order")
    if not spec.chat and any(probe.messages for probe in spec.probes):
        raise UsageError("--prompts-file: some prompts are conversations: add --chat")
    if set(spec.axes) <= OF_BATCHES and lacks_batches(spec, spec.axes):
        raise UsageError(
            f"--axes {','.join(spec.axes)}: it compares batches of 2 rows or more: add one to "
            f"--loads {options.show_loads(spec.batch_sizes)}"
        )
    if spec.chat_template_kwargs is not None:
        options.recorded_object("--chat-template-kwargs", spec.chat_template_kwargs)
        if not spec.chat:
            raise UsageError("--chat-template-kwargs: there is no chat template without --chat")
    check_size(spec)
    backend = backend_of(spec)
    refuse_other_fields(backend, spec)
    backend.check(spec)
    if spec.answer_pattern is not None:
        from ndcheck.analysis.answers import compile_answer_pattern

        if spec.answer is not None:
            raise UsageError("--answer: --answer-pattern says where the answer is: choose one")
        compile_answer_pattern(spec.answer_pattern)
