"""Which implementation computes an op on a device: functional overloads, and the forms that follow.

Implementations live in one package per device type, imported when that device is first seen.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from ndcheck_kernels.scope.refusal import UnsupportedCallError

Implementation = Callable[..., Any]

DEVICE_MODULES = {"cpu": "ndcheck_kernels.cpu", "cuda": "ndcheck_kernels.cuda"}

# Pointwise ops that torch does not tag as such.
_UNTAGGED = ("floor_divide", "rsub")

_implementations: dict[str, dict[OpOverload, Implementation]] = {}
_pointwise: dict[str, Implementation] = {}
# By what torch made in C++: an overload is hashed by a call to Python.
resolved: dict[tuple[Callable[..., Any], str], tuple[Implementation | None, str]] = {}


def implements(*ops: OpOverload, device: str) -> Callable[[Implementation], Implementation]:
    """Register the decorated function for functional overloads; `out=` and in-place forms follow.

    It takes the op's own arguments, and raises `UnsupportedCallError` for what it does not cover.
    """

    def register(implementation: Implementation) -> Implementation:
        for op in ops:
            _implementations.setdefault(device, {})[op] = implementation
        resolved.clear()
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
        resolved.clear()
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


def _name(op: OpOverload) -> str:
    return op._schema.name.split("::")[1]


def find(op: OpOverload, device: str) -> tuple[Implementation | None, str]:
    found = _resolve(op, device), _name(op)
    # Not before: loading implementations empties the cache.
    resolved[op._op, device] = found
    return found


def _resolve(op: OpOverload, device: str) -> Implementation | None:
    _load(device)
    table = _implementations.get(device, {})
    if op in table:
        return table[op]
    functional = _functional(op)
    if functional in table:
        return partial(_write_result, op, table[functional])
    if _is_pointwise(op) or _is_pointwise(functional):
        if device not in _pointwise:
            return op
        pointwise = partial(_pointwise[device], functional)
        return pointwise if functional is op else partial(_write_result, op, pointwise)
    return None


def _is_pointwise(op: OpOverload) -> bool:
    return torch.Tag.pointwise in op.tags or _name(op).removesuffix("_") in _UNTAGGED


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
    pairs = zip(targets, results, strict=True)
    if any((t.dtype, t.device) != (r.dtype, r.device) for t, r in pairs):
        _let_torch_refuse(op, args, kwargs | dict(zip(names, targets, strict=False)))
        results = _tuple(_in_dtype_of(op, implementation, targets, results, args, kwargs))
    for target, result in zip(targets, results, strict=True):
        if target.shape != result.shape:
            if not names:
                _let_torch_refuse(op, args, kwargs)
                raise UnsupportedCallError("its result has another shape than what it writes to")
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
    if _is_pointwise(op) or _is_pointwise(_functional(op)):
        return results
    raise UnsupportedCallError("its result has another dtype than its target")
