"""Errors a user can act on; each carries the exit code the command line ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


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


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Note on an error that nobody expected what was being done, for the one line about it."""
    try:
        yield
    except NdcheckError:
        raise
    except Exception as error:
        error.add_note(what)
        raise


def did_you_mean(name: str, accepted: Iterable[str]) -> str:
    """``", did you mean NAME?"`` for the nearest accepted name, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(accepted), n=1)
    return f", did you mean {near[0]}?" if near else ""
