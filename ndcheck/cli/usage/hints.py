"""What a usage error leaves out: the command or the option that was meant."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from ndcheck.cli.console import DEBUG
from ndcheck.errors import did_you_mean
from ndcheck.samplers.backends import OPTIONS
from ndcheck.samplers.endpoint.credentials import KEY_VARIABLES

MEANT = {
    "diff": "compare",
    "explain": "trace",
    "list": "runs",
    "ls": "runs",
    "measure": "run",
    "minimize": "shrink",
    "show": "report",
    "version": "--version",
}
"""What other tools call it."""
VLLM_PLUGIN = "NDCHECK_VLLM"
MEANT_OPTIONS = {
    **dict.fromkeys(("--url", "--base-url", "--api-base", "--server"), "--endpoint"),
    **dict.fromkeys(("--concurrency", "--batch-size", "--batch-sizes"), "--loads"),
    **dict.fromkeys(("--runs", "--repeats", "--num-samples"), "--samples"),
}


def with_hint(message: str, error: Any, arguments: Sequence[str]) -> str:
    """The message of one of typer's usage errors, in one line with what to give instead."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if context is None:
        return message
    unknown = re.match(r"No such command '(.*?)'", message, re.DOTALL)
    if unknown is not None:
        return f"{unknown[0]}{_other_command(unknown[1], context)}"
    is_extra = message.startswith("Got unexpected extra argument")
    known = {name for each in context.command.params for name in each.opts}
    unknown = re.match(r"No such option: (\S+)", message)
    if unknown is not None and (meant := MEANT_OPTIONS.get(unknown[1])) in known:
        return f"{unknown[0]}, did you mean {meant}?"
    number = re.search(r"\bvalid (integer|number|float)\b", message)
    if number is not None and parameter is not None:
        words = "a whole number" if number[1] == "integer" else "a number, such as 0.5"
        return f"{_typed(parameter, arguments)}: give {words}"
    after = [*arguments, ""][list(arguments).index(context.info_name) + 1 :][0]
    if "--run" in known and after[:1] not in ("", "-") and (is_extra or parameter is not None):
        return f"{message.rstrip('.')}: give --run {shlex.quote(after)}"
    if is_extra:
        usage = " ".join((context.command_path, *context.command.collect_usage_pieces(context)))
        return f"{message}; usage: {usage}"
    if parameter is not None and message.startswith("Missing") and parameter.help:
        return f"{message.rstrip('.')}: {parameter.help}"
    return message


def _typed(parameter: Any, arguments: Sequence[str]) -> str:
    """The option with what was given for it; the variable, where that gave it."""
    given = []
    for argument, following in pairwise((*arguments, "")):
        for name in parameter.opts:
            if argument == name:
                given.append(following)
            elif argument.startswith(f"{name}=" if name.startswith("--") else name):
                given.append(argument.removeprefix(name).removeprefix("="))
    if given:
        return f"{parameter.opts[0]} {given[-1]}"
    variable = str(parameter.envvar)
    return f"{variable}={os.environ.get(variable, '')}"


def _other_command(name: str, context: Any) -> str:
    """The command of another place, of another tool, or the nearest; else all that there are."""
    root = context.find_root()
    wanted = MEANT.get(name, name.replace("_", "-"))
    if wanted == "--version":
        return f", did you mean {root.info_name} --version?"
    for place in (context.command_path, root.info_name):
        for path in _paths(root.command, root.info_name):
            if path.startswith(f"{place} ") and path.endswith(f" {wanted}"):
                return f", did you mean {path}?"
    here = context.command.commands
    return did_you_mean(name, here) or f": there are {', '.join(here)}"


def _paths(command: Any, path: str) -> Iterator[str]:
    for name, each in getattr(command, "commands", {}).items():
        yield f"{path} {name}"
        yield from _paths(each, f"{path} {name}")


def misspelt_variables() -> Iterator[str]:
    """A line for each NDCHECK_* variable that nothing reads and that is almost one that is read."""
    read = {*(row.variable or "" for row in OPTIONS.values()), *KEY_VARIABLES, DEBUG, VLLM_PLUGIN}
    for name in sorted({n for n in os.environ if n.startswith("NDCHECK_")} - read):
        # Other tools may have variables of their own.
        if near := did_you_mean(name, read, cutoff=0.85):
            yield f"nothing reads {name}{near}"
