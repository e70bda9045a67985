"""The dispatch mode in which torch runs batch-invariant kernels.

`invariant_kernels()` pushes a dispatch mode: every aten op of the calling thread, whoever calls it,
arrives here after composition (einsum as bmm, `out=` and in-place forms as themselves). An op is

- passed to torch, if it can only move data or round each element once (`pass_through`),
- computed by an implementation registered for its device (`registry`), and counted,
- decomposed, if torch defines it by other ops, which are then judged one by one,
- passed, if it only touches integers and booleans, whose arithmetic is exact in any order,
- refused otherwise: `UncoveredOpError`.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ndcheck_kernels.scope import gradients, registry
from ndcheck_kernels.scope.pass_through import is_exact
from ndcheck_kernels.scope.refusal import UncoveredOpError, UnsupportedCallError, refusal
from ndcheck_kernels.scope.state import Scope, active_scope, enter, joined

gradients.refuse_within_scopes()

_COMPOSITE = "CompositeImplicitAutograd"  # How torch calls ops defined by other ops alone.


@contextmanager
def invariant_kernels() -> Iterator[Scope]:
    """Compute with batch-invariant kernels in this thread; for inference only, no gradients flow.

    An inner block joins the outer one and yields the same scope. It ends with the last of them,
    since generators and coroutines leave blocks in any order. Other threads are not affected: each
    enters a scope of its own.
    """
    if active_scope() is None:
        scope = Scope()
        with ExitStack() as stack:
            # Below autograd, composite ops arrive whole: no linear or attention splits up unseen.
            stack.enter_context(torch._C._AutoDispatchBelowAutograd())
            stack.enter_context(_InvariantMode(scope))
            enter(scope, stack.pop_all().close)
    with joined() as scope:
        yield scope


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
        if types and any(_is_subclass(kind) for kind in types):
            # What a subclass calls for this op comes here; fake tensors hold no numbers.
            return func(*args, **kwargs) if FakeTensor in types else NotImplemented
        if is_exact(func, args, kwargs):
            return func._op(*args, **kwargs)
        device, floating = _where_and_what(args, kwargs)
        try:
            known = registry.resolved.get((func._op, device))
            implementation, name = known or registry.find(func, device)
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
        except UncoveredOpError:
            raise
        except RuntimeError:
            layouts = [
                "nested" if t.is_nested else t.layout
                for t in _tensors((*args, *kwargs.values()))
                if t.is_nested or t.layout != torch.strided
            ]
            if not layouts:
                raise
            reason = f"the layout of a tensor is {layouts[0]}"
            raise refusal(str(func), floating, device, reason) from None

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
    named = kwargs.get("dtype")
    if isinstance(named, torch.dtype) and not (named.is_floating_point or named.is_complex):
        named = None  # A mask that is counted in int32.
    return device, next((t.dtype for t in tensors if not _is_integral(t)), named)


def _is_subclass(kind: type) -> bool:
    """Whether it takes ops into its own hands."""
    return getattr(kind, "__torch_dispatch__", None) is not torch.Tensor.__torch_dispatch__


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _is_integral(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())
