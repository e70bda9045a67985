"""The parts of a benchmark, one after the other, as long as time is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[2]
Part = tuple[str, Callable[[], None]]
"""Its name, and what measures it, writes what it has and raises where something is wrong."""


def run_parts(parts: list[Part], seconds: float) -> int:
    """Each part, as far as so many seconds go; 1 where one failed or was cut short, which is named.

    A program that a part runs ends with it.
    """
    failed, started = [], time.monotonic()
    signal.signal(signal.SIGALRM, _end_part)
    for name, call in parts:
        elapsed_s = time.monotonic() - started
        if elapsed_s >= seconds:
            print(f"-- {name}: no time left", flush=True)
            continue
        print(f"-- {name} ({elapsed_s:.0f} s)", flush=True)
        signal.setitimer(signal.ITIMER_REAL, seconds - elapsed_s)
        try:
            call()
        except TimeoutError:
            failed.append(f"{name} (cut short)")
        except Exception:
            failed.append(name)
            traceback.print_exc(limit=6)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"{time.monotonic() - started:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    return int(bool(failed))


def _end_part(*_: object) -> None:
    raise TimeoutError


def run_tests(log: Path, tests: tuple[str, ...], timeout_s: float = 120) -> None:
    """Run kernels' tests, what they say into ``log``. Raises RuntimeError where one failed."""
    command = [
        *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"),
        *("--confcutdir=tests/kernels", *tests),
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=timeout_s
    )
    log.write_text(done.stdout, encoding="utf-8")
    print(done.stdout[-2500:], flush=True)
    if done.returncode:
        raise RuntimeError("tests failed")


def compile_each(compile_one: Callable[..., None], *arguments: Iterable[Any]) -> None:
    """Call it for all arguments in other processes, which leave kernels in Triton's cache on disk.

    One after the other they take minutes. Raises what a call raises, or where a process dies.
    """
    with ProcessPoolExecutor(14, get_context("spawn")) as pool:
        try:
            list(pool.map(compile_one, *arguments))
        except TimeoutError:
            pool.shutdown(cancel_futures=True)
            raise
