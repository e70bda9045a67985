"""The greatest and the least of a row, on every device.

Reduction order: any, since comparisons give one result in every order, but for 0 and -0, of which
    torch takes either by their place: here they are always 0.
"""

import torch

from ndcheck_kernels.scope.registry import implements

aten = torch.ops.aten


def register_extremes(device: str) -> None:
    @implements(aten.amax.default, device=device)
    def amax(x: torch.Tensor, dim: tuple[int, ...] = (), keepdim: bool = False) -> torch.Tensor:
        return x.amax(dim, keepdim) + 0.0

    @implements(aten.amin.default, device=device)
    def amin(x: torch.Tensor, dim: tuple[int, ...] = (), keepdim: bool = False) -> torch.Tensor:
        return x.amin(dim, keepdim) + 0.0
