"""The command that repeats a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from ndcheck.plan.conversations import as_messages
from ndcheck.plan.prompts import STANDARD_INPUT
from ndcheck.ranks import program
from ndcheck.records import Probe, Run, RunSpec
from ndcheck.samplers.backends import OPTIONS, backend_of

PROMPTS_FILE = "prompts.jsonl"
_MAX_PROMPTS = 4


def reproduce_command(spec: RunSpec, defaults: RunSpec, directory: str = "") -> str:
    """``ndcheck run`` with only the options that differ from the defaults.

    ``directory`` is the run's, which may hold the prompts: see `prompts_file`.
    """
    return " ".join((program(spec), *_options(spec, defaults, directory)))


def wrapped_command(
    spec: RunSpec,
    defaults: RunSpec,
    width: int,
    directory: str = "",
    outputs: Sequence[str] = (),
) -> list[str]:
    """The same over several lines that a shell still reads as one, where options fit the width.

    ``outputs`` are options that no spec has, such as --html.
    """
    lines = [program(spec)]
    for option in (*_options(spec, defaults, directory), *outputs):
        if len(lines[-1]) + len(option) + 3 > width:
            lines[-1] += " \\"
            lines.append(" ")
        lines[-1] += f" {option}"
    return lines


def _options(spec: RunSpec, defaults: RunSpec, directory: str) -> list[str]:
    backend = backend_of(spec)
    blank = backend.blank(defaults)
    found = _prompts(spec.probes, directory) if spec.probes != defaults.probes else []
    for option in backend.options:
        value = option.get(spec)
        # A target rate chooses the number of samples.
        is_chosen = option.name == "samples" and spec.target_rate
        if value != option.get(blank) and not is_chosen:
            flag = option.short or option.flag
            found += [shell_options([(flag, text)]) for text in option.texts(value)]
    return found


def trusted_options(spec: RunSpec) -> list[tuple[str, str]]:
    """Options of a run that may run code, or say where and what is sent; a flag has no value."""
    return [
        (option.flag, text)
        for option in OPTIONS.values()
        if option.needs_trust and (value := option.get(spec)) and option.needs_trust(value)
        for text in option.texts(value)
    ]


def shell_options(options: Iterable[tuple[str, str]]) -> str:
    """Options as a shell reads them."""
    return " ".join(f"{name} {argument(value)}" if value else name for name, value in options)


def resume_command(spec: RunSpec, directory: str) -> str:
    """The command that goes on with a run, with what only a command line may say."""
    trusted = shell_options(trusted_options(spec))
    return f"{program(spec)} --resume {argument(directory)} {trusted}".rstrip()


def can_go_on(run: Run, *, has_samples: bool) -> bool:
    """Whether a run that is gone on with may end otherwise.

    What refused it would do so again, and so would what let nothing be measured: ``has_samples``
    is whether any sample has no error.
    """
    if run.status == "failed":
        return has_samples and not run.stop_reason
    return run.status != "finished"


def prompts_file(spec: RunSpec, defaults: RunSpec) -> str | None:
    """What the file holds that the command names; None if the command names none."""
    if spec.probes == defaults.probes or _fit_options(spec.probes):
        return None
    return "".join(json.dumps(_entry(probe)) + "\n" for probe in spec.probes)


def _entry(probe: Probe) -> dict[str, Any]:
    prompt = {"messages": as_messages(probe.messages)} if probe.messages else probe.prompt
    held = prompt if isinstance(prompt, dict) else {"prompt": prompt}
    return {"id": probe.probe_id, **held, **({"answer": probe.answer} if probe.answer else {})}


def _prompts(probes: tuple[Probe, ...], directory: str) -> list[str]:
    if not _fit_options(probes):
        return [f"--prompts-file {argument(str(PurePath(directory, PROMPTS_FILE)))}"]
    system = _shared_system(probes)
    return [
        *([] if system is None else [f"--system {argument(system)}"]),
        *(f"--prompt {argument(probe.prompt)}" for probe in probes),
    ]


def _shared_system(probes: tuple[Probe, ...]) -> str | None:
    """The system prompt that all of them begin with, where nothing but the prompt follows."""
    roles = {tuple(message.role for message in probe.messages) for probe in probes}
    texts = {probe.messages[0].content for probe in probes if probe.messages}
    return texts.pop() if roles == {("system", "user")} and len(texts) == 1 else None


def _fit_options(probes: tuple[Probe, ...]) -> bool:
    """Ids have to be p1, p2, ..., which options get: the fillers' contents depend on them."""
    return (
        len(probes) <= _MAX_PROMPTS
        and (_shared_system(probes) is not None or not any(probe.messages for probe in probes))
        and not any("\0" in message for probe in probes for message in _texts(probe))
        and not any(probe.prompt == STANDARD_INPUT or probe.answer for probe in probes)
        and all(probe.probe_id == f"p{i}" for i, probe in enumerate(probes, 1))
    )


def _texts(probe: Probe) -> tuple[str, ...]:
    return (probe.prompt, *(message.content for message in probe.messages))


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
