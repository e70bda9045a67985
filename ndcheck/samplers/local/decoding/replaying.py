"""CUDA graphs of what a batch does again and again: no launch is made by Python.

What is captured is what would run uncaptured, so both give the same bits. What cannot be captured
as a whole is not replayed at all.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ndcheck.errors import first_line
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.device import no_waiting
from ndcheck.samplers.local.memory import is_out_of_memory


class Replayed:
    """One pass of ``batch`` over ``n_columns``, which ``work`` does, captured when first replayed.

    ``failure`` is why it could not be.
    """

    def __init__(self, batch: ExactBatch, work: Callable[[], None], n_columns: int = 1) -> None:
        self.failure: str | None = None
        self._batch, self._work, self._n_columns = batch, work, n_columns
        self._graph: torch.cuda.CUDAGraph | None = None
        self._fires: Counter[str] = Counter()

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def replay(self) -> bool:
        """False where it cannot be captured, and nothing was done."""
        from ndcheck_kernels import active_scope

        scope = active_scope()
        if self._graph is None:
            before = Counter() if scope is None else scope.fires.copy()
            try:
                with self._batch.uncounted():
                    self._graph = self._capture()
            finally:
                if scope is not None:
                    self._fires = scope.fires - before
                    scope.fires.subtract(self._fires)
            if self._graph is None:
                return False
        self._graph.replay()
        self._batch.count_pass(self._n_columns)
        if scope is not None:
            scope.fires.update(self._fires)
        return True

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """The whole pass as a graph, or None: torch would replay also what came before an error."""
        stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool), no_waiting():
                try:
                    self._work()
                except Exception as error:
                    self.failure = _where(error)
                    raise
        except Exception as error:
            _leave_capture(graph, stream, pool)
            if is_out_of_memory(error):
                raise
            self.failure = self.failure or first_line(error)
            return None
        return graph


def _leave_capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> None:
    """Put back what torch leaves behind of a capture that CUDA ended: its stream and its pool."""
    try:
        graph.pool()
    except RuntimeError:
        torch.cuda.set_stream(stream)
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)


def _where(error: Exception) -> str:
    """An error, and the line outside torch that it came from."""
    own = Path(torch.__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    at = [f for f in frames if own not in Path(f.filename).parents][-1]
    return f"{Path(at.filename).name}, line {at.lineno} ({at.line}): {first_line(error)}"
