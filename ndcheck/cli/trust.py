"""What a run's directory may not decide alone: code that runs, and where and what is sent.

The directory may be someone else's. Such options of its run count only where the present command
line gives them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import typer

from ndcheck import request
from ndcheck.engine_request import parse_engine_argument
from ndcheck.errors import UsageError
from ndcheck.records import RunSpec
from ndcheck.reports.wording.reproduction import shell_options, trusted_options

PARAMETERS = ("endpoint", "api_key_file", "engine_arg", "attn", "trust_remote_code")


class Given(NamedTuple):
    """An option as the command line or the environment gives it."""

    option: str
    value: str
    is_typed: bool


def given_options(context: typer.Context) -> list[Given]:
    """Those of PARAMETERS that have a value other than their default."""
    found = []
    for name in PARAMETERS:
        value, source = context.params.get(name), context.get_parameter_source(name)
        if value is None or source is None or source.name == "DEFAULT":
            continue
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if name == "engine_arg":
            values = [parse_engine_argument(each) for each in values]
        texts = ["" if each is True else str(each) for each in values if each is not False]
        option = f"--{name.replace('_', '-')}"
        found += [Given(option, text, source.name == "COMMANDLINE") for text in texts]
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
    recorded = {*asked, ("--attn", spec.attention)}
    for each in given:
        if each.is_typed and (each.option, each.value) not in recorded:
            raise UsageError(
                f"{option} goes on with the run as it was: {each.option} cannot be changed; start "
                "a new run for that"
            )
