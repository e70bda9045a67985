"""Errors a user can act on; each carries the exit code the command line ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NdcheckError(Exception):
    """One clear line for the user: what was wrong and what is accepted."""

    exit_code = 4


class UsageError(NdcheckError):
    """The request itself cannot be carried out as asked: an option, a file, a configuration."""

    exit_code = 2


class BackendError(NdcheckError):
    """The environment failed: the model cannot be loaded, the device or the server is gone."""

    exit_code = 4


class TrialError(NdcheckError):
    """One trial failed and the next may not: recorded as samples with an error, never dropped."""

    exit_code = 4


def did_you_mean(name: str, accepted: Iterable[str]) -> str:
    """``", did you mean NAME?"`` for the nearest accepted name, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(accepted), n=1)
    return f", did you mean {near[0]}?" if near else ""
