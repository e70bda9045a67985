"""Errors a user can act on; each carries the exit code the command line ends with."""

from __future__ import annotations

import difflib
import signal
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


ACTIVITIES: list[str] = []
"""What is being done now, the innermost last."""


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what is being done: while it lasts, and on an error that nobody expected.

    `ndcheck.cli.progress` shows it, and the one line about the error begins with it.
    """
    ACTIVITIES.append(what)
    try:
        yield
    except NdcheckError:
        raise
    except Exception as error:
        error.add_note(what)
        raise
    finally:
        ACTIVITIES.pop()


def did_you_mean(name: str, accepted: Iterable[str], cutoff: float = 0.6) -> str:
    """``", did you mean NAME?"`` for the nearest accepted name, or nothing if none is near.

    ``cutoff`` is how much alike they must be, by difflib's ratio.
    """
    near = difflib.get_close_matches(name, list(accepted), n=1, cutoff=cutoff)
    return f", did you mean {near[0]}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; with the next one where the first ends with a colon."""
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


def how_it_ended(exit_code: int) -> str:
    """How a process did, whose ``exit_code`` is negative where a signal killed it."""
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with {exit_code}"
