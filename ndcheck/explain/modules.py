"""Which module's forward is running."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

_NUMBER = re.compile(r"\.\d+(?=\.|$)")

Enter = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]
Leave = Callable[[torch.nn.Module, Any], None]


class ModulePath:
    """Knows, inside its scope, the path of the innermost module of ``model`` that is running.

    ``on_enter`` is told a module, its arguments and keywords; ``on_leave`` the module and what it
    returned, which it may write into; None if it raised.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        on_enter: Enter = lambda module, args, kwargs: None,
        on_leave: Leave = lambda module, output: None,
    ) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._on_enter = on_enter
        self._on_leave = on_leave

    @property
    def path(self) -> str:
        """As in ``named_modules``; empty for the model itself or outside of it."""
        return self._running[-1] if self._running else ""

    def __enter__(self) -> ModulePath:
        def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            self._running.append(self._names[module])
            self._on_enter(module, args, kwargs)

        def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
            self._on_leave(module, output)
            self._running.pop()

        self._hooks = []
        for module in self._names:
            self._hooks += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, always_call=True),
            ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()


def without_numbers(path: str) -> str:
    """``layers.3.mlp`` as ``layers.*.mlp``: layers of one form belong together."""
    return _NUMBER.sub(".*", path)


def holders_of_layers(model: torch.nn.Module) -> frozenset[str]:
    """Paths of the modules around the decoder layers: to name one of them would say nothing."""
    lists = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
    ]
    parts = max(lists)[1].split(".") if lists else []
    return frozenset({"", *(".".join(parts[:n]) for n in range(1, len(parts) + 1))})
