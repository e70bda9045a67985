"""The live line on stderr: what is done before the first trial ends, and then the progress."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from types import TracebackType

from rich.cells import cell_len, set_cell_size

from ndcheck.cli.console import CLEAR, note, prints_apart
from ndcheck.errors import ACTIVITIES
from ndcheck.reports.progress import progress_line
from ndcheck.runner import Progress

N_LINES_WITHOUT_TERMINAL = 10
TICK_S = 1.0
FIRST_LINE_S, LINE_FACTOR = 10.0, 3
"""Elsewhere than on a terminal: what takes long is said after 10, 30, 90, ... seconds."""


class ActivityLine:
    """What is being done and for how long, as `ndcheck.errors.doing` says, while the block runs.

    On a terminal one line, rewritten every second; elsewhere (a CI log) a line for what takes long.
    What a model prints meanwhile goes to stderr too.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._ends = threading.Event()
        self._least_depth = 1
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._quiet = quiet
        self._prints = prints_apart()

    def __enter__(self) -> ActivityLine:
        self._prints.__enter__()
        if not self._quiet:
            self._thread.start()
        return self

    def settle(self) -> None:
        """From now on the trials have a line of their own: show only what they do within one."""
        self._least_depth = len(ACTIVITIES) + 2

    def _watch(self) -> None:
        what, began_s, next_s = "", time.monotonic(), FIRST_LINE_S
        while not self._ends.wait(TICK_S):
            now = ACTIVITIES[-1] if len(ACTIVITIES) >= self._least_depth else ""
            if now != what:
                what, began_s, next_s = now, time.monotonic(), FIRST_LINE_S
            elapsed_s = time.monotonic() - began_s
            if what and self._is_terminal:
                line = activity_line(what, elapsed_s, shutil.get_terminal_size().columns - 1)
                sys.stderr.write(f"{CLEAR}{line}")
                sys.stderr.flush()
            elif what and elapsed_s >= next_s:
                note(activity_line(what, elapsed_s, 80 - len("ndcheck: ")))
                next_s *= LINE_FACTOR

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._prints.__exit__(kind, error, traceback)
        self._ends.set()
        if not self._quiet:
            self._thread.join()
            if self._is_terminal:
                sys.stderr.write(CLEAR)
                sys.stderr.flush()


def activity_line(what: str, elapsed_s: float, width: int) -> str:
    """What is being done and its minutes and seconds so far, which are never cut."""
    minutes, seconds = divmod(int(elapsed_s), 60)
    clock = f"  {minutes}:{seconds:02d}"
    what = "".join(c if c.isprintable() else "?" for c in what)
    room = max(0, width - len(clock))
    return (what if cell_len(what) <= room else set_cell_size(what, room)) + clock


class ProgressLine:
    """Rewrites one line on a terminal; elsewhere (a CI log) prints about ten."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self._n_done_at_start: int | None = None
        self._started_at_s = 0.0

    def __enter__(self) -> ProgressLine:
        return self

    def show(self, progress: Progress) -> None:
        """Show what is known after a trial; the rate is that of this process alone."""
        if self._quiet:
            return
        if self._n_done_at_start is None:
            self._n_done_at_start, self._started_at_s = progress.n_done, progress.elapsed_s
        n_new = progress.n_done - self._n_done_at_start
        n_left = progress.n_trials - progress.n_done
        eta_s = (progress.elapsed_s - self._started_at_s) / n_new * n_left if n_new else None
        width = shutil.get_terminal_size().columns if self._is_terminal else 80
        line = progress_line(
            progress.n_done,
            progress.n_trials,
            progress.unique,
            progress.first_divergence,
            eta_s,
            width - 1,
            progress.unit,
        )
        if self._is_terminal:
            sys.stderr.write(f"{CLEAR}{line}")
        elif progress.n_done % max(1, progress.n_trials // N_LINES_WITHOUT_TERMINAL) == 0:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_terminal and not self._quiet:
            sys.stderr.write(CLEAR)
            sys.stderr.flush()
