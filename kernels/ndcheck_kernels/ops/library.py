"""Ops of our own, `torch.ops.ndcheck_kernels`: schemas, which devices register code for."""

from typing import Any

import torch
from torch._ops import OpOverload

NAME = "ndcheck_invariant"
"""How transformers calls attention and experts that are made of these ops."""

_library = torch.library.Library("ndcheck_kernels", "DEF")


def declare(schema: str) -> OpOverload:
    """The op of a schema; outside `invariant_kernels()` it raises RuntimeError."""
    name = schema.partition("(")[0]

    def refuse(*args: Any) -> Any:
        raise RuntimeError(f"{name} only runs inside ndcheck_kernels.invariant_kernels()")

    _library.define(schema)
    _library.impl(name, refuse, "CompositeExplicitAutograd")
    op: OpOverload = getattr(torch.ops.ndcheck_kernels, name).default
    return op
