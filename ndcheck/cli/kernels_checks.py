"""The cases of `ndcheck kernels check`, computed here or shared between processes.

Most of a case is compiling (on a GPU) or small steps of Python, which one process does one by one.
As a main program it is one of the processes.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from ndcheck.samplers.local.beside.process import Parent, WorkerProcess

if TYPE_CHECKING:
    import torch

    from ndcheck_kernels.measure.check import Finding

    Work = tuple[int, torch.dtype]
    """A case, by its place in `checked_cases`, and its dtype."""

MOST_PROCESSES = 8
LEAST_CASES = 8
"""A process takes as long to start as so many cases take."""
BYTES = {"cuda": 20 << 30, "cpu": 2 << 30}
"""Of memory, by device: what the largest case takes, in float64."""


def choose_processes(device: torch.device, n_cases: int) -> int:
    """1 means that no other process is worth its start."""
    from ndcheck.samplers.local.memory import free_bytes

    n_cores = len(os.sched_getaffinity(0))
    fitting = free_bytes(device) // BYTES.get(device.type, BYTES["cpu"])
    return max(1, min(MOST_PROCESSES, n_cores, n_cases // LEAST_CASES, fitting))


def check_all(
    work: Sequence[Work], device: torch.device, row_counts: Sequence[int], n_processes: int
) -> Generator[Finding]:
    """In the order of ``work``. Raises what a case raised, and BackendError for a dead process.

    A case that found no memory beside others is computed again when those are done, alone.
    """
    if n_processes == 1:
        from ndcheck_kernels.measure.cases import checked_cases
        from ndcheck_kernels.measure.check import check

        cases = checked_cases(device.type)
        yield from (check(cases[i], dtype, device, row_counts) for i, dtype in work)
        return
    import torch

    with ExitStack() as stack:
        idle = []
        for number in range(1, n_processes + 1):
            name = f"process {number} of {n_processes}, which checked kernels,"
            worker = WorkerProcess("ndcheck.cli.kernels_checks", name)
            idle.append(stack.enter_context(closing(worker)))
            # As many threads as here: what torch's own sums give follows their number.
            worker.send((device, tuple(row_counts), torch.get_num_threads()))
        waiting = deque(enumerate(work))
        left: deque[tuple[int, Work]] = deque()
        busy: dict[Any, tuple[WorkerProcess, int, bool]] = {}
        done: dict[int, Finding] = {}
        for wanted in range(len(work)):
            while wanted not in done:
                while idle and (waiting or (left and not busy)):
                    place, item = (waiting or left).popleft()
                    worker = idle.pop()
                    worker.send(item)
                    busy[worker.connection] = worker, place, not waiting and not busy
                for connection in wait([*busy]):
                    worker, place, is_alone = busy.pop(connection)
                    found, warned = worker.receive()
                    idle.append(worker)
                    if isinstance(found, Exception):  # It found no memory.
                        if is_alone:
                            raise found
                        left.append((place, work[place]))
                        continue
                    done[place] = found
                    for message, category in warned:
                        warnings.warn(message, category, stacklevel=2)
            yield done.pop(wanted)


def main() -> None:
    """Check cases as the parent says: device, numbers of rows and threads first, then the work."""
    parent = Parent()
    device, row_counts, n_threads = parent.receive()
    import torch

    from ndcheck.samplers.local.memory import is_out_of_memory
    from ndcheck_kernels.measure.cases import checked_cases
    from ndcheck_kernels.measure.check import check

    torch.set_num_threads(n_threads)
    cases = checked_cases(device.type)

    def check_one(i: int, dtype: torch.dtype) -> object:
        found: object
        with warnings.catch_warnings(record=True) as warned:
            try:
                found = check(cases[i], dtype, device, row_counts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                found = error.with_traceback(None)  # Its frames hold what there was memory for.
        if device.type == "cuda":
            torch.cuda.empty_cache()  # The other processes have use for it.
        return found, [(str(warning.message), warning.category) for warning in warned]

    parent.answer(check_one)


if __name__ == "__main__":
    main()
