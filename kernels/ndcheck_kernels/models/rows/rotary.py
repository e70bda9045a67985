"""Rotary embeddings past the dispatch mode: their ops pass to torch one and all.

A model rotates its queries and keys in some twenty ops, each of which the mode would judge again in
every layer of every pass. Here they are judged once for each kind of arguments; what is all exact
then runs without the mode, as the same ops.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from ndcheck_kernels.models.interface import is_seen_by_the_mode_alone
from ndcheck_kernels.scope.pass_through import is_exact

_NAME = "apply_rotary_pos_emb"

Function = Callable[..., Any]

_UNKNOWN = object()


def replace_rotary(model: torch.nn.Module) -> None:
    """Let a model's rotary embeddings take this way inside a scope; once."""
    for name in {type(module).__module__ for module in model.modules()}:
        own = getattr(sys.modules[name], _NAME, None)
        if own is not None and not hasattr(own, "judged"):
            setattr(sys.modules[name], _NAME, judged_once(own))


def judged_once(own: Function) -> Function:
    """``own``, whose ops follow from the shapes of its arguments alone."""
    judged: dict[Hashable, bool] = {}

    @functools.wraps(own)
    def rotate(*args: Any, **kwargs: Any) -> Any:
        if not is_seen_by_the_mode_alone():
            return own(*args, **kwargs)
        key = (*map(_kind, args), *kwargs, *map(_kind, kwargs.values()))
        passes = _UNKNOWN not in key and judged.get(key)
        if passes is None:
            with _Judge() as judge:
                result = own(*args, **kwargs)
            judged[key] = judge.passes
            return result
        if not passes:
            return own(*args, **kwargs)
        with torch._C._DisableTorchDispatch():
            return own(*args, **kwargs)

    rotate.judged = judged  # type: ignore[attr-defined]
    return rotate


def _kind(value: Any) -> Hashable:
    if type(value) is torch.Tensor:
        return value.dtype, value.device.type, value.dim(), value.shape[-1] if value.dim() else 0
    return value if isinstance(value, (int, float, str, type(None))) else _UNKNOWN


class _Judge(TorchDispatchMode):
    """Sees whether every op passes; each is then computed as without it."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = True

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.passes &= is_exact(func, args, kwargs)
        return func(*args, **kwargs)


__all__ = ["judged_once", "replace_rotary"]
