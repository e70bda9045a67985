"""What every command says on stderr, and how it ends: an exit code, whatever happened.

1 says that nondeterminism was found, so nothing that nobody expected may end with it, and an output
that nobody can read takes nothing away from a verdict. Imports the standard library alone, since
what fails may be an import.
"""

from __future__ import annotations

import errno
import io
import os
import re
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ndcheck.errors import NdcheckError

EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
"""By the outcome of a verdict."""
FAILED = 4
INTERRUPTED = 130
MAX_BAD_LINES_SHOWN = 5
DEBUG = "NDCHECK_DEBUG"
MAX_WORDS = 400
CLEAR = "\r\x1b[2K"
"""Takes away the live line of a terminal."""
OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory")
"""What torch says, on a CPU and on a GPU; its errors are of kinds that say other things too."""


@contextmanager
def prints_apart() -> Iterator[None]:
    """What models and functions print meanwhile goes to stderr: standard output is for results."""
    with redirect_stdout(sys.stderr):
        yield


def run_guarded(action: Callable[[], int]) -> int:
    """What ``action`` returns, or the exit code of what it raised, said in one line."""
    try:
        return action()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseException as error:
        if os.environ.get(DEBUG):
            traceback.print_exception(error)
        note(describe(error))
        return error.exit_code if isinstance(error, NdcheckError) else FAILED


def describe(error: BaseException) -> str:
    """One line on what went wrong: an error of ours says it all, of others what to do is added."""
    if isinstance(error, NdcheckError):
        return str(error)
    place = "".join(f"{note}: " for note in getattr(error, "__notes__", ())[:1])
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if isinstance(error.filename, str) else ""
        return f"{place}{file}{error.strerror}"
    words = " ".join(str(error).split())
    if len(words) > MAX_WORDS:
        words = f"{words[:MAX_WORDS]}..."
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(words):
        return f"{place}out of memory{f': {words}' if words else ''}"
    kind = type(error).__name__
    return (
        f"{place}unexpected {kind}{f': {words}' if words else ''}; please report it with what the "
        f"same command prints under {DEBUG}=1, and `ndcheck doctor`"
    )


def note(line: str, *, quiet: bool = False) -> None:
    """One line on stderr, whatever it holds."""
    if quiet:
        return
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        from ndcheck.reports.untrusted import without_workflow_commands

        shown = without_workflow_commands(shown)
    clear = CLEAR if sys.stderr.isatty() else ""
    print(f"{clear}ndcheck: {shown}", file=sys.stderr)  # noqa: T201


def note_bad_lines(lines: Sequence[str]) -> None:
    """The first few on stderr; the verdict's reasons hold their number."""
    for line in lines[:MAX_BAD_LINES_SHOWN]:
        note(line)
    if len(lines) > MAX_BAD_LINES_SHOWN:
        note(f"and {len(lines) - MAX_BAD_LINES_SHOWN} more lines")


class Output(io.FileIO):
    """A standard stream that never fails: what cannot be written is dropped, and why is kept."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        while self.failure is None:
            try:
                written = super().write(data)
            except OSError as error:
                self.failure = error
            else:
                if written is not None:
                    return written
                select.select([], [self], [])  # A pipe that does not block, and is full.
        return size


def main(action: Callable[[], int]) -> int:
    """`run_guarded` for a whole process: its streams, its other threads, and Ctrl-C at its end."""
    outputs = [_guard_stream(name, number) for name, number in (("stdout", 1), ("stderr", 2))]
    lost: list[BaseException] = []
    threading.excepthook = lambda hook: lost.append(hook.exc_value or SystemError("a thread died"))
    if not os.environ.get(DEBUG):
        sys.unraisablehook = lambda hook: None
        warnings.showwarning = _show_warning
    code = run_guarded(action)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if lost and code in (0, 3):
        code = run_guarded(lambda: _raise(lost[0]))
    sys.stdout.flush()
    failure = outputs[0].failure
    # A reader that has left (head, less) has what it wanted.
    if failure is not None and failure.errno != errno.EPIPE:
        note(f"stdout: {failure.strerror}")
        code = code if code == 1 else FAILED
    sys.stderr.flush()
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    note(f"warning: {' '.join(str(message).split())}")


def _raise(error: BaseException) -> int:
    raise error


def _guard_stream(name: str, number: int) -> Output:
    stream = getattr(sys, name)
    if stream is None:
        # Where it was closed, the next file to be opened would take its number.
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, number)
        if descriptor != number:
            os.close(descriptor)
    output = Output(number, "wb", closefd=False)
    guarded = io.TextIOWrapper(
        io.BufferedWriter(output),
        encoding=stream.encoding if stream is not None else "utf-8",
        # Completions hold any character; a terminal or a pipe may be limited to ASCII.
        errors="backslashreplace",
        line_buffering=number == 2 or output.isatty(),
    )
    setattr(sys, name, guarded)
    return output
