"""The live progress line on stderr."""

from __future__ import annotations

import shutil
import sys
from types import TracebackType

from ndcheck.reports.terminal import progress_line
from ndcheck.runner import Progress

N_LINES_WITHOUT_TERMINAL = 10


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
            sys.stderr.write(f"\r\x1b[2K{line}")
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
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
