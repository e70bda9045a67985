"""A long count of cases, shared out over processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Share = TypeVar("Share")


def in_processes(
    work: Callable[[int, int], Share], count: int, seed: int, jobs: int
) -> Iterator[Share]:
    """``work(cases, seed)`` in ``jobs`` processes: ``count`` cases in all, a seed a process."""
    counts = [count // jobs + (job < count % jobs) for job in range(jobs)]
    seeds = range(seed, seed + jobs)
    # A fresh interpreter each: a fork would share the locks of a library's threads.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as processes:
        yield from processes.map(work, counts, seeds)
