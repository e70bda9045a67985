"""Complex products and polar coordinates, taken apart into real operations, on any device.

Computes: (a + ib)(c + id) as (ac - bd) + i(ad + bc), each product and sum rounded once, and
    r (cos t + i sin t).
Reduction order: as written. torch's loops fuse a product into the sum in some lanes only.
Depends on: the element alone.
Dtypes: complex64, complex128.
Not claimed: other complex arithmetic, which is refused.
"""

from collections.abc import Callable

import torch

from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import implements

aten = torch.ops.aten

Function = Callable[[torch.Tensor], torch.Tensor]


def register_complex(device: str, cos: Function, sin: Function) -> None:
    """Register them for a device, from its own cosine and sine of radians."""

    @implements(aten.polar.default, device=device)
    def polar(magnitude: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """Complex numbers of a magnitude and an angle in radians."""
        if magnitude.dtype != angle.dtype:
            raise RuntimeError(f"polar coordinates of {magnitude.dtype} and {angle.dtype}")
        return torch.complex(magnitude * cos(angle), magnitude * sin(angle))

    @implements(aten.mul.Tensor, device=device)
    def mul(x: torch.Tensor, y: torch.Tensor | complex) -> torch.Tensor:
        """The product of complex numbers, or of them and a real scalar.

        Real products never come here: torch rounds them once.
        """
        if isinstance(y, float | int):
            return torch.view_as_complex(torch.view_as_real(x) * y)
        if not (isinstance(y, torch.Tensor) and x.is_complex() and y.is_complex()):
            raise UnsupportedCallError("no product of a complex and a real tensor")
        a, b = torch.view_as_real(x.resolve_conj()).unbind(-1)
        c, d = torch.view_as_real(y.resolve_conj()).unbind(-1)
        return torch.complex(a * c - b * d, a * d + b * c)
