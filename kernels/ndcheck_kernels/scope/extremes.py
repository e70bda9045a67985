"""The greatest and the least, on every device.

Reduction order: any, since comparisons give one result in every order, but for equal numbers. Of 0
    and -0 torch takes either by their place: here they are always 0. A top-k takes the first ones.
"""

import torch

from ndcheck_kernels.scope.registry import implements

aten = torch.ops.aten


def topk(
    x: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk, with ties by the lowest index: its own choice follows the number of rows."""
    if x.dim() == 0:
        return torch.topk(x, k, dim, largest, sorted)
    values, indices = x.sort(dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


def register_extremes(device: str) -> None:
    @implements(aten.amax.default, device=device)
    def amax(x: torch.Tensor, dim: tuple[int, ...] = (), keepdim: bool = False) -> torch.Tensor:
        return x.amax(dim, keepdim) + 0.0

    @implements(aten.amin.default, device=device)
    def amin(x: torch.Tensor, dim: tuple[int, ...] = (), keepdim: bool = False) -> torch.Tensor:
        return x.amin(dim, keepdim) + 0.0
