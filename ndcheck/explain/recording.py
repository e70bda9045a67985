"""Watch every op and module of a forward pass, and record what each gave the probe alone."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from ndcheck.explain.alignment import as_bytes, clone_exactly, equal_bits
from ndcheck.explain.modules import ModulePath


@contextmanager
def unseen() -> Iterator[None]:
    """Look at tensors as they are: no mode sees it, and no tensor guards itself."""
    # To disable modes takes longer than a small op, and mostly there is no other.
    has_modes = _len_torch_dispatch_stack() or _len_torch_dispatch_stack_pre_dispatch()
    modes = _disable_current_modes() if has_modes else nullcontext()
    with torch._C.DisableTorchFunctionSubclass(), modes:
        yield


Status = Literal["introduces", "inherits", "clean", "in a module", "not compared"]
Cause = Literal["shape", "place", "neighbours", "chance"]
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


UNWRITTEN = {
    *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty"),
    *("new_empty_strided", "resize_"),
}
"""What these give holds whatever was in the memory before."""


class Watch(TorchDispatchMode):
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
        # A view adds nothing up, and torch 2.11 lets none be made of itself twice.
        if func.is_view or op_name(func) in UNWRITTEN:
            return func(*args, **kwargs)
        key = self._key(self._path.path, op_name(func))
        with unseen():
            noted = self.before_op(key, _arguments(func, args, kwargs))
        with torch._C._ForceDispatchKeyGuard(*self._keys):
            result = func(*args, **kwargs)
        outputs = tree_flatten(result)[0]
        if any(map(is_floating, outputs)):
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


class AlonePass(Watch):
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


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def digest_rows(rows: Iterable[Tensor]) -> str:
    """16 hexadecimal digits over the bits of ``rows``."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(as_bytes(row).cpu().numpy().data)
    return digest.hexdigest()


def shapes_of(values: Iterable[Any]) -> str:
    return " ".join("x".join(map(str, v.shape)) for v in values if is_floating(v))


def _location() -> str:
    """file:line of the model's code that called the op."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("torch.", "ndcheck.", "ndcheck_kernels.")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
