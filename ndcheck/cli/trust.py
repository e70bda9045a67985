"""What a run's directory may not decide alone: code that runs, and where and what is sent.

The directory may be someone else's. Such options of its run count only where the present command
line gives them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import typer

from ndcheck import request
from ndcheck.errors import UsageError
from ndcheck.records import RunSpec
from ndcheck.reports.wording.reproduction import shell_options, trusted_options
from ndcheck.samplers.backends import OPTIONS

PARAMETERS = frozenset(name for name, option in OPTIONS.items() if option.needs_trust)


class Given(NamedTuple):
    """An option as the command line or the environment gives it."""

    option: str
    value: str
    is_typed: bool


def given_options(context: typer.Context) -> list[Given]:
    """Those of PARAMETERS that have a value other than their default."""
    found = []
    for name in PARAMETERS - {"header"}:  # Its values are not recorded.
        value, source = context.params.get(name), context.get_parameter_source(name)
        if value is None or source is None or source.name == "DEFAULT":
            continue
        option = OPTIONS[name]
        texts = option.texts(option.parse(value))
        found += [Given(option.flag, text, source.name == "COMMANDLINE") for text in texts]
    return found


def confirm(spec: RunSpec, given: Sequence[Given], option: str) -> None:
    """Raise UsageError unless all that needs trust in a recorded spec is given again, as it was."""
    request.check(spec)
    asked = trusted_options(spec)
    typed = {(each.option, each.value) for each in given}
    needed = [pair for pair in asked if pair[0] != "--header"]  # Their values are not recorded.
    if any(pair not in typed for pair in needed):
        raise UsageError(
            f"{option}: what runs code or is sent somewhere comes from the command line alone: if "
            f"you trust this run, add {shell_options(asked)}"
        )
    recorded = {
        (option.flag, text)
        for option in map(OPTIONS.__getitem__, PARAMETERS)
        for text in option.texts(option.get(spec))
    }
    for each in given:
        if each.is_typed and (each.option, each.value) not in recorded:
            raise UsageError(
                f"{option} goes on with the run as it was: {each.option} cannot be changed; start "
                "a new run for that"
            )
