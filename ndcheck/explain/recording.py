"""Every op and module of a forward pass: recorded alone, and compared in a load.

A load's pass is watched twice: as it is, and *repaired*, where whatever leaves the track of the
pass alone is written back at once to what it was there. So in the repaired pass every op is given
the probe's own inputs, and one that returns other bits introduces them. What has no counterpart
alone (a loop over rows, work that torch does not see) is compared as part of its module.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from ndcheck.explain.alignment import (
    Geometry,
    clone_exactly,
    equal_bits,
    max_ulp,
    write_exactly,
)
from ndcheck.explain.modules import ModulePath

unseen = _disable_current_modes

# These put values elsewhere and make none: with the probe's inputs they can only be misplaced.
MOVERS = frozenset(
    "pad constant_pad_nd cat stack clone copy_ roll flip repeat repeat_interleave gather scatter "
    "scatter_ index index_select index_copy index_copy_ index_put index_put_ masked_fill "
    "masked_fill_ masked_scatter where tril triu take_along_dim embedding".split()
)

Status = Literal["introduces", "inherits", "clean", "in a module", "not compared"]
Cause = Literal["shape", "neighbours", "chance"]
Key = tuple[str, str, int]
"""(module path, op or class of the module, how many times it ran there before)."""
Place = tuple[str, str]
"""(op, form of module): layers of one form count as one place."""
Argument = tuple[str, int]
"""(an argument's name, index of a tensor within it)."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that can be made again, alone and loaded: to see which kernels it launches."""

    func: Any
    alone: tuple[tuple[Any, ...], dict[str, Any]]
    loaded: tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Record:
    """One op or module of the probe's pass alone: inputs and outputs as they were."""

    inputs: dict[Argument, Any]
    outputs: list[Any]
    location: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """What an op or module gave the probe's row, given its own inputs, and what it gave alone.

    ``shapes`` are of floating inputs, alone and loaded.
    """

    max_ulp: int
    digest: str
    shapes: tuple[str, str]
    is_module: bool


class _Watch(TorchDispatchMode):
    """Sees every op whole, and has it run as if nobody looked; sees modules come and go.

    Composite ops arrive whole below autograd only, but there `matmul` finds that its weight needs
    no gradient and may choose another kernel: so they run with the dispatch keys from outside.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._path = ModulePath(model, self._unseen_enter, self._unseen_leave)
        self._weights = weight_storages(model)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._running: list[Key] = []

    def __enter__(self) -> Self:
        self._path.__enter__()
        self._keys = (
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set(),
        )
        self._below_autograd = torch._C._AutoDispatchBelowAutograd()
        self._below_autograd.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below_autograd.__exit__(*error)
        self._path.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:  # It adds nothing up, and torch 2.11 lets no view be made of itself twice.
            return func(*args, **kwargs)
        key = self._key(self._path.path, op_name(func))
        with unseen():
            noted = self.before_op(key, _arguments(func, args, kwargs))
        with torch._C._ForceDispatchKeyGuard(*self._keys):
            result = func(*args, **kwargs)
        outputs = tree_flatten(result)[0]
        if any(map(_is_floating, outputs)):
            with unseen():
                self.after_op(key, noted, outputs, func, (args, kwargs))
        return result

    def before_op(self, key: Key, inputs: dict[Argument, Any]) -> Any:
        """What `after_op` is told of the inputs, which the op may write into."""

    def after_op(self, key: Key, noted: Any, outputs: list[Any], func: Any, call: Any) -> None:
        raise NotImplementedError

    def enter_module(self, key: Key, inputs: dict[Argument, Any]) -> None:
        """A module begins."""

    def leave_module(self, key: Key, outputs: list[Any]) -> None:
        """A module has returned ``outputs``; empty if it raised."""

    def _unseen_enter(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        key = self._key(self._path.path, type(module).__name__)
        self._running.append(key)
        leaves = tree_flatten((args, kwargs))[0]
        with unseen():
            self.enter_module(key, {("", i): leaf for i, leaf in enumerate(leaves)})

    def _unseen_leave(self, module: torch.nn.Module, output: Any) -> None:
        with unseen():
            self.leave_module(self._running.pop(), tree_flatten(output)[0])

    def _key(self, path: str, name: str) -> Key:
        nth = self._counts[path, name]
        self._counts[path, name] += 1
        return path, name, nth

    def _is_weight(self, value: Tensor) -> bool:
        return _storage(value) in self._weights


class AlonePass(_Watch):
    """Keeps every op and module of the pass alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.records: dict[Key, Record] = {}
        self._entered: list[dict[Argument, Any]] = []
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def before_op(self, key: Key, inputs: dict[Argument, Any]) -> dict[Argument, Any]:
        return self._keep_all(inputs)

    def after_op(self, key: Key, noted: Any, outputs: list[Any], func: Any, call: Any) -> None:
        self.records[key] = Record(noted, list(map(self._keep, outputs)), _location())

    def enter_module(self, key: Key, inputs: dict[Argument, Any]) -> None:
        self._entered.append(self._keep_all(inputs))

    def leave_module(self, key: Key, outputs: list[Any]) -> None:
        self.records[key] = Record(self._entered.pop(), list(map(self._keep, outputs)))

    def _keep_all(self, inputs: dict[Argument, Any]) -> dict[Argument, Any]:
        return {name: self._keep(value) for name, value in inputs.items()}

    def _keep(self, value: Any) -> Any:
        """A copy, as later ops may write into it; the last one where it is still the same."""
        if not isinstance(value, Tensor) or self._is_weight(value):
            return value
        place = (value.data_ptr(), value.dtype, value.shape, value.stride())
        kept = self._kept.get(place)
        if kept is None or not equal_bits(kept, value):
            kept = self._kept[place] = clone_exactly(value)
        return kept


@dataclass(frozen=True, slots=True)
class Setting:
    """What places the probe in a load's pass, and what it did alone."""

    model: torch.nn.Module
    alone: dict[Key, Record]
    geometry: Geometry
    slot: int

    def rows(self, outputs: list[Any], like: list[Any]) -> list[tuple[Tensor, Tensor]] | None:
        """The probe's part of every floating output beside the one alone; None if unclear."""
        if len(outputs) != len(like):
            return None
        rows = []
        for output, own in zip(outputs, like, strict=True):
            if not _is_floating(own):
                continue
            if not _is_floating(output) or own.dtype != output.dtype:
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
        pad = self.geometry.pad
        shifts = (0, pad, self.slot * self.geometry.queries[1] + pad)
        return part.shape == own.shape and any(torch.equal(part, own + s) for s in shifts)


class NaturalPass(_Watch):
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
        self.differs[key] = not _are_equal(rows) if rows else None

    def leave_module(self, key: Key, outputs: list[Any]) -> None:
        self.modules.add(key)
        self.after_op(key, None, outputs, None, None)


@dataclass(frozen=True, slots=True)
class _Frame:
    """A running module: what it did alone, if it was given the probe's own inputs."""

    record: Record | None
    shapes: str
    n_open: int


class RepairedPass(_Watch):
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
        shapes = _shapes(inputs.values())
        self._frames.append(_Frame(record if is_given else None, shapes, len(self._open)))

    def leave_module(self, key: Key, outputs: list[Any]) -> None:
        frame = self._frames.pop()
        if self._is_over or frame.record is None:
            return
        inside = self._open[frame.n_open :]
        rows = self._setting.rows(outputs, frame.record.outputs)
        if not rows:
            return
        if not _are_equal(rows):
            self._note(key, frame.record, rows, frame.shapes, is_module=True)
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
        is_equal = _are_equal(rows)
        if not is_equal and key[1] in MOVERS:
            return False
        self.compared.add(key)
        if is_equal:
            return True
        leaves, form = tree_flatten(call)
        shapes = _shapes(leaves)
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
        both = _shapes(record.inputs.values()), shapes
        self.differences[key] = Difference(ulp, digest, both, is_module)
        self._is_over = key == self._stop_at
        if not self._is_over or self._stop_after:
            for ours, own in rows:
                write_exactly(ours, (), own)


def cache_tensors(cache: Any) -> Iterator[Tensor]:
    """What a cache's layers hold that has floating values, in an order of their own."""
    for layer in cache.layers:
        held = [value for _, value in sorted(vars(layer).items())]
        yield from filter(_is_floating, tree_flatten(held)[0])


def op_name(func: Any) -> str:
    """``aten.linear.default`` as ``linear``."""
    return str(func._schema.name.split("::")[1])


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Argument, Any]:
    """Every leaf of the arguments, in the order in which ``tree_flatten`` gives them."""
    names = (argument.name for argument in func._schema.arguments)
    return {
        (name, i): leaf
        for name, value in (*zip(names, args, strict=False), *kwargs.items())
        for i, leaf in enumerate(tree_flatten(value)[0])
    }


def weight_storages(model: torch.nn.Module) -> set[int]:
    """Storages of parameters and buffers, which no forward pass writes."""
    return {_storage(t) for t in (*model.parameters(), *model.buffers())}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _are_equal(rows: list[tuple[Tensor, Tensor]]) -> bool:
    return all(equal_bits(ours, own) for ours, own in rows)


def digest_rows(rows: Iterable[Tensor]) -> str:
    """16 hexadecimal digits over the bits of ``rows``."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(row.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _shapes(values: Iterable[Any]) -> str:
    return " ".join("x".join(map(str, v.shape)) for v in values if _is_floating(v))


def _location() -> str:
    """file:line of the model's code that called the op."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("torch.", "ndcheck.", "ndcheck_kernels.")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
