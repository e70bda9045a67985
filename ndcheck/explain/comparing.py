"""Compare a forward pass of a batch with the pass of the probe alone, op by op.

The pass of the batch runs twice. The first is left as it is. In the second, the *repaired* pass,
the probe's row of every output that differs from the pass alone is overwritten at once with what
it was alone. So each op is given the probe's own inputs, and an op that still returns other bits
*introduces* the difference; all others only *inherit* one. What has no counterpart in the pass
alone (a loop over rows, work that torch does not see) is compared as part of its module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ndcheck.explain.alignment import Geometry, clone_exactly, equal_bits, max_ulp, write_exactly
from ndcheck.explain.modules import without_numbers
from ndcheck.explain.recording import (
    Argument,
    Call,
    Cause,
    Key,
    Place,
    Record,
    Status,
    Watch,
    digest_rows,
    is_floating,
    shapes_of,
)
from ndcheck.explain.traced import OpFinding

# These put values elsewhere and make none: with the probe's inputs they can only be misplaced.
MOVERS = {
    *("pad", "constant_pad_nd", "cat", "stack", "clone", "copy_", "roll", "flip", "repeat"),
    *("repeat_interleave", "gather", "scatter", "scatter_", "index", "index_select", "index_copy"),
    *("index_copy_", "index_put", "index_put_", "masked_fill", "masked_fill_", "masked_scatter"),
    *("where", "tril", "triu", "take_along_dim", "embedding"),
}


@dataclass(frozen=True, slots=True)
class Difference:
    """What an op or module gave the probe's row, given its own inputs, and what it gave alone.

    ``shapes`` are of floating inputs, alone and loaded.
    """

    max_ulp: int
    digest: str
    shapes: tuple[str, str]
    is_module: bool


@dataclass(frozen=True, slots=True)
class Setting:
    """What places the probe in a load's pass, and what it did alone."""

    model: torch.nn.Module
    alone: dict[Key, Record]
    geometry: Geometry
    slot: int
    holders: frozenset[str] = frozenset()
    """Modules around all layers, in which an op is not found by comparing them as a whole."""

    def rows(self, outputs: list[Any], like: list[Any]) -> list[tuple[Tensor, Tensor]] | None:
        """The probe's part of every floating output beside the one alone; None if unclear."""
        if len(outputs) != len(like):
            return None
        rows = []
        for output, own in zip(outputs, like, strict=True):
            if not is_floating(own):
                continue
            if not is_floating(output) or own.dtype != output.dtype:
                return None
            place = self.geometry.place(own.shape, output.shape, self.slot)
            if place is None:
                return None
            rows.append((output[place], own))
        return rows

    def is_given(self, name: Argument, loaded: Any, own: Any, *, is_weight: bool) -> bool:
        """Whether the probe's part of an input is what it was alone."""
        if not isinstance(loaded, Tensor):
            return True
        is_floating = loaded.is_floating_point()
        if not isinstance(own, Tensor):
            return not is_floating  # a mask that is left out where nothing is masked
        place = self.geometry.place(own.shape, loaded.shape, self.slot)
        if is_weight:
            return place is not None and loaded.data_ptr() == own.data_ptr()
        if place is None:
            return not is_floating
        part = loaded[place]
        if is_floating or loaded.dtype == torch.bool or loaded.is_complex():
            return equal_bits(part, own)
        # Positions in the cache are further on by the padding, rows of all tokens also by the slot.
        column = self.geometry.first_column
        shifts = (0, self.geometry.pad, self.slot * self.geometry.queries[1] + column)
        return part.shape == own.shape and any(torch.equal(part, own + s) for s in shifts)


class NaturalPass(Watch):
    """Whether each op's output, in the load as it is, differs from the one alone.

    ``modules`` are those that ran, among the ops in the order in which all ended.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting.model)
        self._setting = setting
        self.differs: dict[Key, bool | None] = {}
        self.modules: set[Key] = set()

    def after_op(self, key: Key, noted: Any, outputs: list[Any], func: Any, call: Any) -> None:
        record = self._setting.alone.get(key)
        rows = record and self._setting.rows(outputs, record.outputs)
        self.differs[key] = not are_equal(rows) if rows else None

    def leave_module(self, key: Key, outputs: list[Any]) -> None:
        self.modules.add(key)
        self.after_op(key, None, outputs, None, None)


@dataclass(frozen=True, slots=True)
class _Frame:
    """A running module: what it did alone, if it was given the probe's own inputs."""

    record: Record | None
    shapes: str
    n_open: int


class RepairedPass(Watch):
    """Writes every difference back to what it was alone, at once, and notes where it was.

    ``stop_at`` ends repairs at that op or module, which is itself still repaired if ``stop_after``.
    ``compared`` are the ops that were given the probe's inputs; ``in_module`` those that were not,
    in a module that was, and so was compared as a whole.
    """

    def __init__(
        self, setting: Setting, stop_at: Key | None = None, *, stop_after: bool = False
    ) -> None:
        super().__init__(setting.model)
        self._setting = setting
        self._stop_at = stop_at
        self._stop_after = stop_after
        self._is_over = False
        self._open: list[Key] = []
        self._frames: list[_Frame] = []
        self.differences: dict[Key, Difference] = {}
        self.calls: dict[Key, Call] = {}
        self.compared: set[Key] = set()
        self.in_module: set[Key] = set()

    def before_op(self, key: Key, inputs: dict[Argument, Any]) -> bool:
        return self._is_given(self._setting.alone.get(key), inputs)

    def after_op(self, key: Key, noted: bool, outputs: list[Any], func: Any, call: Any) -> None:
        if self._is_over:
            return
        record = self._setting.alone.get(key)
        if record is None or not noted or not self._compare(key, record, outputs, func, call):
            self._open.append(key)

    def enter_module(self, key: Key, inputs: dict[Argument, Any]) -> None:
        record = self._setting.alone.get(key)
        is_given = self._is_given(record, inputs)
        shapes = shapes_of(inputs.values())
        self._frames.append(_Frame(record if is_given else None, shapes, len(self._open)))

    def leave_module(self, key: Key, outputs: list[Any]) -> None:
        frame = self._frames.pop()
        if self._is_over or frame.record is None:
            return
        inside = self._open[frame.n_open :]
        rows = self._setting.rows(outputs, frame.record.outputs)
        if not rows:
            return
        if not are_equal(rows):
            self._note(key, frame.record, rows, frame.shapes, is_module=True)
        if key[0] in self._setting.holders:
            return
        self.in_module.update(inside)
        del self._open[frame.n_open :]

    def _is_given(self, record: Record | None, inputs: dict[Argument, Any]) -> bool:
        if self._is_over or record is None:
            return False
        return all(
            self._setting.is_given(
                name,
                value,
                record.inputs.get(name),
                is_weight=isinstance(value, Tensor) and self._is_weight(value),
            )
            for name, value in inputs.items()
        )

    def _compare(self, key: Key, record: Record, outputs: list[Any], func: Any, call: Any) -> bool:
        rows = self._setting.rows(outputs, record.outputs)
        if not rows:
            return False
        is_equal = are_equal(rows)
        if not is_equal and key[1] in MOVERS:
            return False
        self.compared.add(key)
        if is_equal:
            return True
        leaves, form = tree_flatten(call)
        shapes = shapes_of(leaves)
        if rows[0][0].is_cuda and len(leaves) == len(record.inputs):
            alone = tree_unflatten(list(record.inputs.values()), form)
            again = [clone_exactly(x) if isinstance(x, Tensor) else x for x in leaves]
            self.calls[key] = Call(func, alone, tree_unflatten(again, form))
        self._note(key, record, rows, shapes, is_module=False)
        return True

    def _note(
        self,
        key: Key,
        record: Record,
        rows: list[tuple[Tensor, Tensor]],
        shapes: str,
        *,
        is_module: bool,
    ) -> None:
        ulp = max(max_ulp(ours.contiguous(), own.contiguous()) for ours, own in rows)
        digest = digest_rows(ours for ours, _ in rows)
        both = shapes_of(record.inputs.values()), shapes
        self.differences[key] = Difference(ulp, digest, both, is_module)
        self._is_over = key == self._stop_at
        if not self._is_over or self._stop_after:
            for ours, own in rows:
                write_exactly(ours, (), own)


def cache_tensors(cache: Any) -> Iterator[Tensor]:
    """What a cache's layers hold that has floating values, in an order of their own."""
    for layer in cache.layers:
        held = [value for _, value in sorted(vars(layer).items())]
        yield from filter(is_floating, tree_flatten(held)[0])


def are_equal(rows: list[tuple[Tensor, Tensor]]) -> bool:
    return all(equal_bits(ours, own) for ours, own in rows)


def find_ops(
    natural: NaturalPass,
    repaired: RepairedPass,
    named: dict[Key, Difference],
    causes: dict[Key, Cause],
    reaching: set[Place],
    records: dict[Key, Record],
) -> Iterator[OpFinding]:
    """Every op, and the modules like those that introduce a difference as a whole, in order."""
    whole = {place_of(key) for key, difference in named.items() if difference.is_module}
    for key, differs in natural.differs.items():
        module, op, nth = key
        is_module = key in natural.modules
        if key in named:
            yield _introducer(key, named[key], causes[key], reaching, records[key])
        elif not is_module or place_of(key) in whole:
            status: Status = "not compared"
            if key in repaired.compared or is_module:
                status = "inherits" if differs else "clean"
            elif key in repaired.in_module:
                status = "in a module"
            yield OpFinding(module, op, nth, status, is_module=is_module)


def _introducer(
    key: Key, difference: Difference, cause: Cause, reaching: set[Place], record: Record
) -> OpFinding:
    own = [value for value in record.outputs if isinstance(value, Tensor)]
    own = [value for value in own if value.is_floating_point() and value.dim()]
    module, op, nth = key
    return OpFinding(
        module,
        op,
        nth,
        "introduces",
        cause,
        place_of(key) in reaching,
        difference.is_module,
        difference.max_ulp,
        difference.digest,
        digest_rows(own),
        difference.shapes,
        str(own[0].dtype).removeprefix("torch."),
        record.location,
    )


def place_of(key: Key) -> Place:
    return key[1], without_numbers(key[0])
