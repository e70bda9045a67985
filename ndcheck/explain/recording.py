"""Every op of a forward pass: recorded alone, and replayed in a load with the probe's inputs."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ndcheck.explain.alignment import (
    Geometry,
    clone_exactly,
    equal_bits,
    max_ulp,
    write_exactly,
)
from ndcheck.explain.modules import ModulePath, without_numbers

Status = Literal["introduces", "inherits", "clean", "not compared"]
Cause = Literal["shape", "neighbours", "chance"]
Key = tuple[str, str, int]
"""(module path, op, how many times that op ran in that module before)."""
Place = tuple[str, str]
"""(op, form of module): layers of one form count as one place."""
Argument = tuple[str, int]
"""(an argument's name, index of a tensor within it)."""


@dataclass(frozen=True, slots=True)
class SoloOp:
    """One op of the probe's pass alone: inputs and outputs as they were."""

    inputs: dict[Argument, Any]
    outputs: list[Any]
    location: str


@dataclass(frozen=True, slots=True)
class OpFinding:
    """One op of the loaded pass, and what it does to the probe's row.

    ``status``: *introduces* if, given the probe's own inputs, it returns other bits than alone;
    *inherits* if only its inputs differed; *clean* if its output is the one alone. ``cause`` says
    whether other neighbours of the same shape change the bits again, or the same call does.
    ``digest`` is over the replayed row; ``shapes`` are of floating inputs, alone and loaded.
    """

    module: str
    op: str
    nth: int
    status: Status
    cause: Cause | None = None
    max_ulp: int | None = None
    digest: str | None = None
    digest_alone: str | None = None
    shapes: tuple[str, str] = ("", "")
    dtype: str = ""
    location: str = ""
    is_faithful: bool = True


class _Recorder(TorchDispatchMode):
    """Sees every op whole, and has it run as if nobody looked.

    Composite ops arrive whole below autograd only, but there `matmul` finds that its weight needs
    no gradient and may choose another kernel: so they run with the dispatch keys from outside.
    """

    def __init__(self, path: ModulePath) -> None:
        super().__init__()
        self._path = path
        self._counts: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> Self:
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

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.is_view:  # It adds nothing up, and torch 2.11 lets no view be made of itself twice.
            return func(*args, **kwargs)
        with torch._C._ForceDispatchKeyGuard(*self._keys):
            return func(*args, **kwargs)

    def _key(self, func: Any) -> Key:
        name = op_name(func)
        module = self._path.path
        nth = self._counts[module, name]
        self._counts[module, name] += 1
        return module, name, nth


class SoloRecorder(_Recorder):
    """Keeps every op of the pass alone; ``weights`` are storages that need no copy."""

    def __init__(self, path: ModulePath, weights: set[int]) -> None:
        super().__init__(path)
        self._weights = weights
        self.ops: dict[Key, SoloOp] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        key = self._key(func)
        # Copies, as later ops may write into them; of views too, whose base may be written.
        inputs = {name: self._keep(value) for name, value in _arguments(func, args, kwargs).items()}
        result = self._run(func, args, kwargs)
        outputs = [self._keep(value) for value in tree_flatten(result)[0]]
        self.ops[key] = SoloOp(inputs, outputs, _location())
        return result

    def _keep(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or _storage(value) in self._weights:
            return value
        return clone_exactly(value)


@dataclass(frozen=True, slots=True)
class Call:
    """A call that can be made again, alone and loaded: to see which kernels it launches."""

    func: Any
    alone: tuple[tuple[Any, ...], dict[str, Any]]
    loaded: tuple[tuple[Any, ...], dict[str, Any]]


class LoadedRecorder(_Recorder):
    """Compares every op of the loaded pass with ``solo``'s, and replays it."""

    def __init__(
        self,
        path: ModulePath,
        weights: set[int],
        solo: dict[Key, SoloOp],
        geometry: Geometry,
        slot: int,
    ) -> None:
        super().__init__(path)
        self._weights = weights
        self._solo = solo
        self._geometry = geometry
        self._slot = slot
        self.findings: list[OpFinding] = []
        self.calls: dict[Place, Call] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        key = self._key(func)
        solo = self._solo.get(key)
        if solo is None or not any(map(_is_floating, solo.outputs)):
            result = self._run(func, args, kwargs)
            if any(map(_is_floating, tree_flatten(result)[0])):
                self.findings.append(OpFinding(*key, "not compared"))
            return result
        before = self._copied(_arguments(func, args, kwargs))
        _, form = tree_flatten((args, kwargs))
        result = self._run(func, args, kwargs)
        outputs = tree_flatten(result)[0]
        self.findings.append(self._compare(key, func, solo, before, form, outputs))
        return result

    def _compare(
        self,
        key: Key,
        func: Any,
        solo: SoloOp,
        before: dict[Argument, Any],
        form: TreeSpec,
        outputs: list[Any],
    ) -> OpFinding:
        expected = [value for value in solo.outputs if _is_floating(value)]
        actual = self._rows(outputs, solo.outputs)
        probe_only = self._fed(solo, before, (self._slot,))
        if actual is None or probe_only is None:
            return OpFinding(*key, "not compared", location=solo.location)

        def replay(inputs: dict[Argument, Any]) -> list[Tensor]:
            args, kwargs = tree_unflatten(list(self._copied(inputs).values()), form)
            outputs = tree_flatten(self._run(func, args, kwargs))[0]
            return self._rows(outputs, solo.outputs) or []

        is_faithful = func.is_view or _equal(replay(before), actual)
        replayed = actual if func.is_view else replay(probe_only)
        introduces = not func.is_view and not _equal(replayed, expected)
        status: Status = "inherits"
        cause: Cause | None = None
        if introduces:
            status, cause = "introduces", "shape"
            if not _equal(replay(probe_only), replayed):
                cause = "chance"
            else:
                copies = self._fed(solo, before, range(self._geometry.batch_size))
                if copies is not None and not _equal(replay(copies), replayed):
                    cause = "neighbours"
            place = (key[1], without_numbers(key[0]))
            if place not in self.calls and solo.inputs.keys() == before.keys():
                alone, loaded = (
                    tree_unflatten(list(inputs.values()), form)
                    for inputs in (solo.inputs, probe_only)
                )
                self.calls[place] = Call(func, alone, loaded)
        elif _equal(actual, expected):
            status = "clean"
        return OpFinding(
            *key,
            status,
            cause,
            max(map(max_ulp, replayed, expected)) if introduces else 0,
            _digest(replayed),
            _digest(expected),
            (_shapes(solo.inputs.values()), _shapes(before.values())),
            str(expected[0].dtype).removeprefix("torch."),
            solo.location,
            is_faithful,
        )

    def _fed(
        self, solo: SoloOp, before: dict[Argument, Any], slots: Iterable[int]
    ) -> dict[Argument, Any] | None:
        """The loaded inputs with the probe's own rows at ``slots``; None where they have no place.

        Only floating inputs are fed: positions and masks of the row are the load's own.
        """
        fed = dict(before)
        for name, loaded in before.items():
            if not _is_floating(loaded) or self._is_shared(loaded):
                continue
            own = solo.inputs.get(name)
            if not isinstance(own, Tensor):
                return None
            copy = clone_exactly(loaded)
            for slot in slots:
                place = self._geometry.place(own.shape, loaded.shape, slot)
                if place is None or not write_exactly(copy, place, own):
                    return None
            fed[name] = copy
        return fed

    def _copied(self, inputs: dict[Argument, Any]) -> dict[Argument, Any]:
        return {n: v if self._is_shared(v) else clone_exactly(v) for n, v in inputs.items()}

    def _rows(self, outputs: list[Any], like: list[Any]) -> list[Tensor] | None:
        """The probe's part of every floating output."""
        rows = []
        for output, own in zip(outputs, like, strict=True):
            if not _is_floating(own):
                continue
            place = self._geometry.place(own.shape, output.shape, self._slot)
            if place is None:
                return None
            rows.append(output[place].clone())
        return rows

    def _is_shared(self, value: Any) -> bool:
        return not isinstance(value, Tensor) or _storage(value) in self._weights


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


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(equal_bits, a, b))


def _digest(rows: list[Tensor]) -> str:
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
