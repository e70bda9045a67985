"""The options of a run, one row each: its name, its place in a RunSpec, and how it is read back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from ndcheck.errors import UsageError, did_you_mean
from ndcheck.plan.arrivals import parse_arrivals, with_clock
from ndcheck.plan.size import MAX_BATCH_SIZE
from ndcheck.records import (
    ARMS,
    AXES,
    FED_AXES,
    AnswerKind,
    Arm,
    Axis,
    Batching,
    Decoding,
    Mode,
    Probe,
    RunSpec,
)
from ndcheck.storage.reading import parse_json, read_text

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
TRANSFORMERS = "transformers"
MAX_LOADS = 1000
MAX_WIDTH = 1024
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Torch's name for each that ``--dtype`` takes."""
SHORT_DTYPES = {name: short for short, name in DTYPES.items()}

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True, slots=True)
class Option:
    """One option of `ndcheck run`, which is a keyword of `ndcheck.measure` by the same name.

    ``default`` is what is typed where nothing is, ``fields`` are its places in a RunSpec, dotted.
    ``parse`` makes a field's value of what was typed, ``show`` a text of it again, or of each of
    its items where the option ``repeats``. ``has_variable``: NDCHECK_NAME stands for it too.
    ``needs_trust`` says of a value whether it runs code or says what is sent where; None: never.
    """

    name: str
    fields: tuple[str, ...]
    default: Any
    parse: Callable[[Any], Any] = lambda value: value
    show: Callable[[Any], str] = str
    repeats: bool = False
    short: str = ""
    has_variable: bool = False
    needs_trust: Callable[[Any], bool] | None = None

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str | None:
        return f"NDCHECK_{self.name.upper()}" if self.has_variable else None

    def is_given(self, value: Any) -> bool:
        """Is what was typed more than nothing?"""
        return value is not None and value != self.default and value != []

    def get(self, spec: RunSpec) -> Any:
        """The field of ``spec``; None where it has no such place."""
        found: Any = spec if self.fields else None
        for part in ".".join(self.fields[:1]).split("."):
            found = None if found is None else getattr(found, part)
        return found

    def put(self, spec: RunSpec, value: Any) -> RunSpec:
        """``spec`` with the value in all its places."""
        for field in self.fields:
            spec = _replaced(spec, field, value)
        return spec

    def texts(self, value: Any) -> list[str]:
        """What has to be typed after the flag, once for each time; empty after a switch."""
        if value is None or value is False:
            return []
        if value is True:
            return [""]
        return [self.show(each) for each in value] if self.repeats else [self.show(value)]


def _replaced(record: Any, field: str, value: Any) -> Any:
    head, _, rest = field.partition(".")
    return replace(
        record, **{head: _replaced(getattr(record, head), rest, value) if rest else value}
    )


def join(values: str | Sequence[object]) -> str:
    """``"1,2"`` of either form that an API takes."""
    return values if isinstance(values, str) else ",".join(map(str, values))


def parse_loads(values: str | Sequence[object]) -> tuple[int, ...]:
    """Batch sizes as `parse_batch_sizes` reads them; none yet for ``auto``."""
    text = join(values)
    return () if text == "auto" else parse_batch_sizes(text)


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """``"1,4-6,8-64:x2"`` as batch sizes. Raises UsageError on anything but distinct ones >= 1."""
    sizes: list[int] = []
    for part in map(str.strip, text.split(",")):
        for size in _batch_sizes(part):
            if size in sizes:
                raise UsageError(f"--loads: {size} is given twice")
            sizes.append(size)
            if len(sizes) > MAX_LOADS:
                raise UsageError(f"--loads {part:.20}: more than {MAX_LOADS} batch sizes")
    return tuple(sizes)


def _batch_sizes(part: str) -> Iterator[int]:
    """A number, or a range whose sizes grow by 1, or by the factor after ``:x``."""
    found = re.fullmatch(r"0*(\d+)(?:-0*(\d+)(?::x0*(\d+))?)?", part, re.ASCII)
    first, last, factor = found.groups() if found else ("0", None, None)
    if first == "0" or factor in ("0", "1"):
        raise UsageError(
            f"--loads: {part!r} is not a batch size; give numbers of 1 or more, or ranges such as "
            "1-8 and 1-64:x2"
        )
    last = last or first
    if max(len(first), len(last), len(factor or "")) > len(str(MAX_BATCH_SIZE)):
        raise UsageError(f"--loads {part:.20}: a batch has at most {MAX_BATCH_SIZE} rows")
    size, largest = int(first), int(last)
    if size > largest:
        raise UsageError(f"--loads: {part!r} is an empty range")
    while size <= largest:
        yield size
        size = size * int(factor) if factor else size + 1


def parse_axes(values: str | Sequence[str]) -> tuple[Axis, ...]:
    """``"slot,cache"`` as invariance properties, in their usual order; ``all`` for every one."""
    text = join(values)
    if "all" in text.split(",") and text != "all":
        raise UsageError(f"--axes {text}: all stands alone, and is every property")
    return AXES if text == "all" else parse_names("--axes", text, AXES)


def parse_scheduled_axes(values: str | Sequence[str]) -> tuple[Axis, ...]:
    """The same where a scheduler decides what a pass holds: ``all`` are those it leaves to ask."""
    axes = parse_axes(values)
    return SCHEDULED_AXES if axes == AXES else axes


def parse_widths(values: str | Sequence[object] | None) -> tuple[int, ...]:
    """``"2,4-8"`` as ascending numbers of tokens. Raises UsageError unless distinct, from 2 on."""
    if values is None:
        return DEFAULTS.widths
    widths: list[int] = []
    for part in map(str.strip, join(values).split(",")):
        found = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 2 <= first <= last <= MAX_WIDTH:
            raise UsageError(
                f"--widths: {part!r:.20} is not a number, or a range, from 2 to {MAX_WIDTH}"
            )
        for width in range(first, last + 1):
            if width in widths:
                raise UsageError(f"--widths: {width} is given twice")
            widths.append(width)
    return tuple(sorted(widths))


def parse_draft(text: str | None) -> str | None:
    """A model, or ``layers:N``. Raises UsageError where N is no number of layers."""
    if text is not None:
        n_draft_layers(text)
    return None if text is None else str(text)


def n_draft_layers(text: object) -> int | None:
    """The N of ``layers:N``; None where a draft is a model of its own. Raises UsageError."""
    head, colon, number = str(text).partition("layers:")
    if head or not colon:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,3}", number):
        raise UsageError(f"--draft {text!s:.20}: give how many of the first layers: layers:2")
    return int(number)


def parse_arms(values: str | Sequence[str] | None) -> tuple[Arm, ...]:
    """``"stock,invariant"`` as kernel sets; None is both."""
    return DEFAULTS.arms if values is None else parse_names("--kernels", join(values), ARMS)


def short_dtype(text: str) -> str:
    """A dtype by the name that it has here."""
    return SHORT_DTYPES.get(text, text)


def choice(option: str, accepted: Any) -> Callable[[str], Any]:
    """A parser for one of the values of a Literal, which raises UsageError for any other."""

    def parse(text: str) -> Any:
        if text not in get_args(accepted):
            raise UsageError(f"{option} {text}: choose from {', '.join(get_args(accepted))}")
        return text

    return parse


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


def parse_template_kwargs(given: str | Mapping[str, Any] | None) -> str | None:
    """An object of JSON in one line. Raises UsageError for anything else."""
    if given is None:
        return None
    return compact(parse_object("--chat-template-kwargs", given))


def parse_object(option: str, given: str | Mapping[str, Any]) -> dict[str, Any]:
    """An object of JSON, or of the file after ``@``. Raises UsageError without repeating it."""
    place = option
    try:
        if isinstance(given, str) and given.startswith("@"):
            place = f"{option} {given}"
            given = read_text(Path(given[1:]))
        text = given if isinstance(given, str) else json.dumps(given, allow_nan=False)
        value = parse_json(text)
        compact(value).encode()
    except OSError as error:
        raise UsageError(f"{place}: {error.strerror}") from None
    except (ValueError, TypeError, RecursionError) as error:
        reason = getattr(error, "msg", "it is no JSON")
        raise UsageError(f"{place}: {reason}: give an object, such as '{{\"top_k\": 1}}'") from None
    if not isinstance(value, dict):
        raise UsageError(f"{place}: give an object, such as '{{\"top_k\": 1}}'")
    return value


def recorded_object(option: str, text: str) -> dict[str, Any]:
    """The same of a record, which may name no file. Raises UsageError."""
    if text.startswith("@"):
        raise UsageError(f"{option}: a record holds the object itself, not a file's name")
    return parse_object(option, text)


def compact(value: Any) -> str:
    """JSON in one line, the same for equal objects."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def show_loads(sizes: Sequence[int]) -> str:
    return join(sizes) or "auto"


PROMPT = Option("prompt", (), None, short="-p")
PROMPTS_FILE = Option("prompts_file", (), None)
PROMPT_COLUMN = Option("prompt_column", (), None)
SYSTEM = Option("system", (), None)
MODEL = Option("model", ("model",), DEFAULTS.model, has_variable=True)
ASKED = (PROMPT, PROMPTS_FILE, PROMPT_COLUMN, SYSTEM, MODEL)
"""What is asked of whom: options that stand before all others."""
ENGINE = Option("engine", (), TRANSFORMERS, has_variable=True)
TP = Option("tp", ("tensor_parallel",), DEFAULTS.tensor_parallel)
WIDTHS = Option("widths", ("widths",), None, parse_widths, join, has_variable=True)
DRAFT = Option("draft", ("draft",), None, parse_draft, has_variable=True)
KERNELS = Option("kernels", ("arms",), None, parse_arms, join, has_variable=True)
ARRIVALS = Option(
    "arrivals",
    ("arrivals",),
    None,
    lambda text: DEFAULTS.arrivals if text is None else parse_arrivals(text, "step").recorded,
    lambda text: with_clock(text, "step"),
    has_variable=True,
)
_AXES = Option("axes", ("axes",), DEFAULTS.axes, parse_axes, join, has_variable=True)
SCHEDULED_AXES: tuple[Axis, ...] = tuple(axis for axis in AXES if axis not in FED_AXES)
SCHEDULED = replace(_AXES, parse=parse_scheduled_axes)
"""``--axes`` of a backend that cannot choose what a pass holds."""
SHARED = (
    Option("loads", ("batch_sizes",), DEFAULTS.batch_sizes, parse_loads, show_loads,
           has_variable=True),
    _AXES,
    Option("mode", ("mode",), DEFAULTS.mode, choice("--mode", Mode), has_variable=True),
    Option("batching", ("batching",), DEFAULTS.batching, choice("--batching", Batching),
           has_variable=True),
    ARRIVALS,
    Option("samples", ("n_samples",), DEFAULTS.n_samples, short="-n", has_variable=True),
    Option("max_tokens", ("decoding.max_tokens",), DEFAULTS.decoding.max_tokens,
           has_variable=True),
    Option("temperature", ("decoding.temperature",), DEFAULTS.decoding.temperature),
    Option("seed", ("seed", "decoding.seed"), DEFAULTS.seed, has_variable=True),
    Option("dtype", ("dtype",), DEFAULTS.dtype, short_dtype, has_variable=True),
    Option("device", ("device",), DEFAULTS.device, has_variable=True),
    # With a slash it is a kernel of the hub's.
    Option("attn", ("attention",), DEFAULTS.attention, has_variable=True,
           needs_trust=lambda name: "/" in name),
    KERNELS,
    Option("confidence", ("confidence",), DEFAULTS.confidence),
    Option("target_rate", ("target_rate",), DEFAULTS.target_rate),
    Option("random_weights", ("random_weights",), DEFAULTS.random_weights),
    Option("answer", ("answer",), DEFAULTS.answer,
           lambda kind: None if kind is None else choice("--answer", AnswerKind)(kind)),
    Option("answer_pattern", ("answer_pattern",), DEFAULTS.answer_pattern),
    Option("chat", ("chat",), DEFAULTS.chat),
    Option("chat_template_kwargs", ("chat_template_kwargs",), None, parse_template_kwargs),
    Option("trust_remote_code", ("trust_remote_code",), DEFAULTS.trust_remote_code,
           needs_trust=bool),
    Option("stop_on_divergence", ("stop_on_divergence",), DEFAULTS.stop_on_divergence),
    Option("allow_latent", ("allow_latent",), DEFAULTS.allow_latent),
)  # fmt: skip
"""Those of several backends, in the order in which a command gives them."""
OF_SOME = frozenset({
    "batching", "arrivals", "dtype", "device", "attn", "kernels", "random_weights",
    "trust_remote_code", "chat_template_kwargs",
})  # fmt: skip
"""Of SHARED those that a backend has to name to take them."""
