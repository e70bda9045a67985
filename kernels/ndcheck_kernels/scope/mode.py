"""The scope in which torch runs batch-invariant kernels, and the registry that they come from.

`invariant_kernels()` pushes a dispatch mode: every aten op of the calling thread, whoever calls it,
arrives here after composition (einsum as bmm, `out=` and in-place forms as themselves). An op is

- passed to torch, if it can only move data or round each element once (`pass_through`),
- computed by an implementation registered for its device, and counted,
- decomposed, if torch defines it by other ops, which are then judged one by one,
- passed, if it only touches integers and booleans, whose arithmetic is exact in any order,
- refused otherwise: `UncoveredOpError`.

Implementations live in one module per device type, imported when that device is first seen.
"""

import importlib
import importlib.util
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ndcheck_kernels.scope.pass_through import is_exact

Implementation = Callable[..., Any]

DEVICE_MODULES = {"cpu": "ndcheck_kernels.cpu", "cuda": "ndcheck_kernels.cuda"}

# What `Scope.missing` understands beside op names: one of the ops must have fired.
OP_GROUPS: dict[str, frozenset[str]] = {
    "gemm": frozenset({"linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "mv", "dot"}),
    "attention": frozenset({"attention", "scaled_dot_product_attention"}),
}

_COMPOSITE = "CompositeImplicitAutograd"  # How torch calls ops defined by other ops alone.

_implementations: dict[str, dict[OpOverload, Implementation]] = {}
_pointwise: dict[str, Implementation] = {}
_thread = threading.local()


class UnsupportedCallError(Exception):
    """Raised by an implementation for a call it does not cover; the mode then refuses."""


class UncoveredOpError(RuntimeError):
    """An op without a batch-invariant implementation ran inside `invariant_kernels()`."""

    def __init__(
        self, op: str, dtype: torch.dtype | None, device: str, module: str | None, reason: str
    ) -> None:
        self.op, self.dtype, self.device, self.module = op, dtype, device, module
        where = f" in {module}" if module else ""
        super().__init__(
            f"no batch-invariant {op} ({dtype} on {device}){where}: {reason}. Run this model with "
            "stock kernels, or register an implementation with ndcheck_kernels.implements."
        )


def refusal(op: str, dtype: torch.dtype | None, device: str, reason: str) -> UncoveredOpError:
    """The error to raise, noted in this thread's scope, naming the module whose forward runs."""
    scope = active_scope()
    if scope is not None:
        scope.refused[op] += 1
    return UncoveredOpError(op, dtype, device, _calling_module(), reason)


@dataclass
class Scope:
    """What happened inside one `invariant_kernels()` block."""

    fires: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def missing(self, expected: Iterable[str] = ("gemm", "attention")) -> tuple[str, ...]:
        """The expected ops or `OP_GROUPS` that no implementation has computed so far."""
        fired = set(self.fires)
        return tuple(name for name in expected if not fired & OP_GROUPS.get(name, {name}))


def implements(*ops: OpOverload, device: str) -> Callable[[Implementation], Implementation]:
    """Register the decorated function for functional overloads; `out=` and in-place forms follow.

    It takes the op's own arguments, and raises `UnsupportedCallError` for what it does not cover.
    """

    def register(implementation: Implementation) -> Implementation:
        for op in ops:
            _implementations.setdefault(device, {})[op] = implementation
        _found.clear()
        return implementation

    return register


def accept(*ops: OpOverload, device: str) -> None:
    """Declare that torch's own kernels for these ops are batch-invariant on this device."""
    for op in ops:
        implements(op, device=device)(op)


def implements_pointwise(device: str) -> Callable[[Implementation], Implementation]:
    """Register `fn(op, *args, **kwargs)` for every pointwise op that is not exact by itself.

    On a device without one, pointwise ops pass: there an element's result depends on it alone.
    """

    def register(implementation: Implementation) -> Implementation:
        _pointwise[device] = implementation
        _found.clear()
        return implementation

    return register


def covered_ops(device: str = "cpu") -> tuple[str, ...]:
    """The ops with an implementation on this device, by name, pointwise ops not listed."""
    _load(device)
    return tuple(sorted({_name(op) for op in _implementations.get(device, {})}))


def accepted_ops(device: str) -> tuple[str, ...]:
    """Those of `covered_ops` that torch's own kernels compute, which no scope counts."""
    _load(device)
    table = _implementations.get(device, {})
    replaced = {_name(op) for op, implementation in table.items() if implementation is not op}
    return tuple(sorted({_name(op) for op in table} - replaced))


def active_scope() -> Scope | None:
    """The scope this thread is in."""
    return getattr(_thread, "scope", None)


@contextmanager
def invariant_kernels() -> Iterator[Scope]:
    """Compute with batch-invariant kernels in this thread; for inference only, no gradients flow.

    An inner block joins the outer one and yields the same scope. Other threads are not affected:
    each enters a scope of its own.
    """
    outer = active_scope()
    if outer is not None:
        yield outer
        return
    scope = Scope()
    _thread.scope = scope
    try:
        # Below autograd, composite ops arrive whole: no linear or attention splits up unseen.
        with torch._C._AutoDispatchBelowAutograd(), _InvariantMode(scope):
            yield scope
    finally:
        _thread.scope = None


class _InvariantMode(TorchDispatchMode):
    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.scope = scope

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The guard that this leaves out costs a microsecond per op; compiled code runs eagerly
        # under a mode anyway.
        return False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if is_exact(func, args, kwargs):
            return func(*args, **kwargs)
        device, floating = _where_and_what(args, kwargs)
        try:
            implementation, name = _found.get((func, device)) or _find(func, device)
            if floating is None:
                result = func(*args, **kwargs)
                if all(_is_integral(t) for t in _tensors((result,))):
                    return result  # Exact in any order.
            if implementation is None:
                return self._decompose(func, args, kwargs)
            if implementation is not func:
                self.scope.fires[name] += 1
            elif floating is not None and floating.is_complex:
                raise UnsupportedCallError("complex arithmetic rounds several times")
            return implementation(*args, **kwargs)
        except UnsupportedCallError as unsupported:
            raise refusal(str(func), floating, device, str(unsupported)) from None

    def _decompose(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE):
            raise UnsupportedCallError("nothing is registered for it")
        with self:
            return func.decompose(*args, **kwargs)


def _where_and_what(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, torch.dtype | None]:
    """The device type of a call, and its floating dtype if it has one."""
    first = args[0] if args else None
    if isinstance(first, torch.Tensor) and first.dim() and first.is_floating_point():
        return first.device.type, first.dtype
    tensors = list(_tensors((*args, *kwargs.values())))
    # Tensors without dimensions may live on the CPU whatever the device of the others.
    device = next((t.device.type for t in sorted(tensors, key=lambda t: -t.dim())), "cpu")
    return device, next((t.dtype for t in tensors if not _is_integral(t)), kwargs.get("dtype"))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _is_integral(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _name(op: OpOverload) -> str:
    return op._schema.name.split("::")[1]


_found: dict[tuple[OpOverload, str], tuple[Implementation | None, str]] = {}


def _find(op: OpOverload, device: str) -> tuple[Implementation | None, str]:
    found = _resolve(op, device), _name(op)
    # Not before: loading implementations empties the cache.
    _found[op, device] = found
    return found


def _resolve(op: OpOverload, device: str) -> Implementation | None:
    _load(device)
    table = _implementations.get(device, {})
    if op in table:
        return table[op]
    functional = _functional(op)
    if functional in table:
        return partial(_write_result, op, table[functional])
    if torch.Tag.pointwise in op.tags or torch.Tag.pointwise in functional.tags:
        if device not in _pointwise:
            return op
        pointwise = partial(_pointwise[device], functional)
        return pointwise if functional is op else partial(_write_result, op, pointwise)
    return None


def _load(device: str) -> None:
    module = DEVICE_MODULES.get(device)
    if module is not None and importlib.util.find_spec(module) is not None:
        importlib.import_module(module)


def _functional(op: OpOverload) -> OpOverload:
    """The overload that returns what this `out=` or in-place one writes; else the op itself."""
    schema = op._schema
    if not any(argument.is_write for argument in schema.arguments):
        return op
    inputs = [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]
    packet = getattr(getattr(torch.ops, op.namespace), _name(op).removesuffix("_"), None)
    for overload in packet.overloads() if packet else ():
        candidate: OpOverload = getattr(packet, overload)
        arguments = candidate._schema.arguments
        if inputs == [(a.name, str(a.type)) for a in arguments] and not any(
            a.is_write for a in arguments
        ):
            return candidate
    return op


def _write_result(op: OpOverload, implementation: Implementation, *args: Any, **kwargs: Any) -> Any:
    """Call the functional form and copy its results to where the `out=` or in-place form writes."""
    names = [argument.name for argument in op._schema.arguments if argument.is_out]
    targets = [kwargs.pop(name) for name in names] if names else [args[0]]
    results = _tuple(implementation(*args, **kwargs))
    if any(t.dtype != r.dtype for t, r in zip(targets, results, strict=True)):
        _let_torch_refuse(op, args, kwargs | dict(zip(names, targets, strict=False)))
        results = _tuple(_in_dtype_of(op, implementation, targets, results, args, kwargs))
    for target, result in zip(targets, results, strict=True):
        if target.shape != result.shape:
            target.resize_(result.shape)
        target.copy_(result)
    return targets[0] if len(targets) == 1 else tuple(targets)


def _tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _let_torch_refuse(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise what torch itself raises for these dtypes. Its result is thrown away."""
    args, kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    op(*args, **kwargs)


def _in_dtype_of(
    op: OpOverload, implementation: Implementation, targets: list[torch.Tensor],
    results: tuple[torch.Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """What torch writes to targets of another dtype: a reduction to it, or rounded elements."""
    if any(argument.name == "dtype" for argument in op._schema.arguments):
        return implementation(*args, **{**kwargs, "dtype": targets[0].dtype})
    if torch.Tag.pointwise in op.tags or torch.Tag.pointwise in _functional(op).tags:
        return results
    raise UnsupportedCallError("its result has another dtype than its target")


def _calling_module() -> str | None:
    """The path of the module whose forward is running, from the outermost module on the stack."""
    frame: FrameType | None = sys._getframe(1)
    modules: list[torch.nn.Module] = []
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.nn.Module):
            modules.append(caller)
        frame = frame.f_back
    if not modules:
        return None
    inner, root = modules[0], modules[-1]
    path = next((name for name, module in root.named_modules() if module is inner), "")
    return f"{path or 'the root module'} ({type(inner).__name__})"
