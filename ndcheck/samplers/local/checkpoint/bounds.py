"""A bound in time and memory on what someone else's files make this process do."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from ndcheck.errors import UsageError

MOST_BYTES = 8 << 30


class _TooLongError(BaseException):
    """No `Exception`, for the code that is stopped may catch all of those."""


@contextmanager
def bounded(what: str, cpu_s: float) -> Iterator[None]:
    """Raise UsageError where the block takes longer, or more than `MOST_BYTES`, naming ``what``.

    The process's CPU time counts, so a machine that is busy stops nothing. Python's signals reach
    the main thread only: elsewhere nothing is bounded.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource

    def stop(*_: object) -> None:
        raise _TooLongError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + MOST_BYTES
    handler = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        if soft == resource.RLIM_INFINITY or soft > most:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        yield
    except _TooLongError:
        raise UsageError(f"{what}: it took more than {cpu_s:g} s and was stopped") from None
    except MemoryError:
        raise UsageError(f"{what}: it took more than {MOST_BYTES >> 30} GiB") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
