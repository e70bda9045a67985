"""Which module's forward is running."""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

_NUMBER = re.compile(r"\.\d+(?=\.|$)")


class ModulePath:
    """Knows, inside its scope, the path of the innermost module of ``model`` that is running."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[str] = []

    @property
    def path(self) -> str:
        """As in ``named_modules``; empty for the model itself or outside of it."""
        return self._running[-1] if self._running else ""

    def __enter__(self) -> ModulePath:
        def enter(module: torch.nn.Module, inputs: Any) -> None:
            self._running.append(self._names.get(module, self.path))

        def leave(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            self._running.pop()

        self._hooks = (
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        )
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
