"""What cannot be computed is refused by name: the op, its dtype and device, and the module."""

import sys
from types import FrameType

import torch

from ndcheck_kernels.scope.state import active_scope


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
