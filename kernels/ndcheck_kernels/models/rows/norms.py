"""RMSNorm modules as one launch each, for the invariant arm on CUDA, in their own bits.

transformers writes RMSNorm in some ten ops, of which a prefill of a short prompt notices little but
the time that the host takes to start them. A module is replaced where the kernel gives the bits of
the module's own ops, in the scope, on rows that no two orders of summation agree on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ndcheck_kernels.cuda.compiler import compile_failure, quiet_compiler
from ndcheck_kernels.cuda.rows.composed_norm import Weighting, composed_norm
from ndcheck_kernels.scope.mode import invariant_kernels
from ndcheck_kernels.scope.refusal import UncoveredOpError
from ndcheck_kernels.scope.state import active_scope

_TRIED_ROWS = 64
_EPSILONS = ("variance_epsilon", "eps")

_Here = tuple[torch.device, torch.dtype]
_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[_Here, Weighting | None]]
_known = weakref.WeakKeyDictionary()
"""By module what was found of it where it was, in the dtype that it had: a model may be moved."""


@contextmanager
def composed_norms(model: torch.nn.Module) -> Iterator[int]:
    """Run the model's RMSNorm modules as one launch each; yields how many keep their bits so."""
    replaced = []
    for module in model.modules():
        if not _may_fit(module):
            continue
        known, here = _known.setdefault(module, {}), _here(module)
        if here not in known:
            known[here] = _weighting(module)
        if (weighting := known[here]) is not None:
            module.forward = partial(_forward, module, weighting, here)
            replaced.append(module)
    try:
        yield len(replaced)
    finally:
        for module in replaced:
            del module.forward  # The class's own shows again.


def _may_fit(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        "RMSNorm" in type(module).__name__
        and isinstance(weight, torch.Tensor)
        and type(weight.data) is torch.Tensor
        and weight.dim() == 1
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and "forward" not in vars(module)
        and any(isinstance(getattr(module, name, None), float) for name in _EPSILONS)
    )


def _here(module: Any) -> _Here:
    return module.weight.device, module.weight.dtype


def _epsilon(module: Any) -> float:
    return next(float(getattr(module, name)) for name in _EPSILONS if hasattr(module, name))


@torch.inference_mode()
def _weighting(module: Any) -> Weighting | None:
    """The one with which the kernel has the module's own bits; None if there is none."""
    weight = module.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    here = {"generator": generator, "device": weight.device}
    rows = torch.randn(2, _TRIED_ROWS // 2, weight.numel(), **here)
    rows *= torch.randint(-6, 7, rows.shape, **here).exp2()
    # Epsilon tells in small rows alone.
    rows *= torch.randint(-16, 1, (*rows.shape[:2], 1), **here).exp2()
    rows = rows.to(weight.dtype)
    # Weights of a new model are all one, and hide how they are rounded.
    drawn = torch.randn(weight.shape, **here).to(weight.dtype)
    given = [rows]
    if _is_gated(module):
        given.append(rows.flip(-1).contiguous())
    try:
        with quiet_compiler(), invariant_kernels():
            own = torch.func.functional_call(module, {"weight": drawn}, tuple(given))
            for weighting in Weighting:
                got = _composed(drawn, _epsilon(module), weighting, *given)
                if own.dtype == got.dtype and torch.equal(own, got):
                    return weighting
    except (TypeError, ValueError, UncoveredOpError):
        return None  # The module takes or does something else, as it will say where it runs.
    except Exception as error:
        if compile_failure(error) is None:
            raise
    return None


def _is_gated(module: Any) -> bool:
    return type(module).__name__.endswith("Gated")


def _forward(
    module: Any, weighting: Weighting, here: _Here, *given: torch.Tensor, **named: Any
) -> torch.Tensor:
    scope = active_scope()
    is_as_tried = not named and len(given) == 1 + _is_gated(module) and _here(module) == here
    if scope is None or not is_as_tried or (given[0].device, given[0].dtype) != here:
        own: Callable[..., torch.Tensor] = type(module).forward
        return own(module, *given, **named)
    scope.fires.update(("mean", "rsqrt"))
    return _composed(module.weight, _epsilon(module), weighting, *given)


def _composed(
    weight: torch.Tensor,
    epsilon: float,
    weighting: Weighting,
    hidden_states: torch.Tensor,
    *gate: torch.Tensor,
) -> torch.Tensor:
    with torch._C._DisableTorchDispatch():
        y = composed_norm(hidden_states, weight, epsilon, weighting)
        if gate:
            y = (y * torch.nn.functional.silu(gate[0].float())).to(y.dtype)
    return y


__all__ = ["composed_norms"]
