"""A top-k that does not depend on where its candidates are: ties go to the lowest index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class TiesByIndex(TorchDispatchMode):
    """Inside of which `torch.topk` takes of equal numbers the first ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        compute = _topk if func is torch.ops.aten.topk.default else func
        return compute(*args, **(kwargs or {}))


def _topk(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)
