"""The forms of a matrix product, each as the one or two that a device computes.

linear, matmul (with its broadcasting), mv and dot become `mm`, `bmm` or `addmm` of the same rows,
so every form has their bits.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch._ops import OpOverload

from ndcheck_kernels.ops.library import declare
from ndcheck_kernels.ops.shapes import check_product
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import implements

aten = torch.ops.aten

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
GroupedProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Products that are one part of a longer sum: fp32 (fp64 for fp64), not rounded to their operands'
# dtype. [M, K] x [N, K]^T -> [M, N]; and [P, K] x [E, K, N] -> [P, N], rows in groups as below.
partial_linear_op = declare("partial_linear(Tensor x, Tensor weight) -> Tensor")
partial_grouped_op = declare("partial_grouped(Tensor rows, Tensor weight, Tensor ends) -> Tensor")


def register_partial_products(device: str, linear: Product, grouped: GroupedProduct) -> None:
    """Register the parts of longer sums for a device."""
    implements(partial_linear_op, device=device)(linear)
    implements(partial_grouped_op, device=device)(grouped)


def register_products(
    device: str,
    mm: Product,
    bmm: Product,
    addmm: Callable[..., torch.Tensor],
    baddbmm: Callable[..., torch.Tensor],
) -> None:
    """Register every form for a device, from what it has under these names in torch.ops.aten."""
    mm, addmm = _checked(aten.mm.default, mm, 2), _checked(aten.addmm.default, addmm, 2)
    bmm = _checked(aten.bmm.default, bmm, 3)
    baddbmm = _checked(aten.baddbmm.default, baddbmm, 3)
    for op, implementation in (
        (aten.mm.default, mm),
        (aten.bmm.default, bmm),
        (aten.addmm.default, addmm),
        (aten.baddbmm.default, baddbmm),
    ):
        implements(op, device=device)(implementation)

    @implements(aten.linear.default, device=device)
    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[..., K] x [N, K]^T + [N]."""
        if weight.dim() != 2:
            if bias is not None and (bias.dim() or x.dim() == 2):
                raise RuntimeError(f"a bias {list(bias.shape)} beside a {weight.dim()}-D weight")
            return matmul(x, weight.t()) if bias is None else matmul(x, weight.t()) + bias
        rows = _as_rows(x)
        out = mm(rows, weight.t()) if bias is None else addmm(bias, rows, weight.t())
        return out.view(*x.shape[:-1], weight.shape[0])

    @implements(aten.matmul.default, device=device)
    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The product of torch.matmul; a vector on the left is one row."""
        if not (a.dim() and b.dim()):
            raise RuntimeError(f"matmul of {a.dim()} and {b.dim()} dims: it takes 1 at least")
        if a.dim() == 1:
            return matmul(a[None], b).squeeze(-2 if b.dim() > 1 else 0)
        if b.dim() == 1:
            return matmul(a, b[:, None]).squeeze(-1)
        if b.dim() == 2:
            return mm(_as_rows(a), b).view(*a.shape[:-1], b.shape[-1])
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        left = a.expand(*batch, *a.shape[-2:]).reshape(batch.numel(), *a.shape[-2:])
        right = b.expand(*batch, *b.shape[-2:]).reshape(batch.numel(), *b.shape[-2:])
        return bmm(left, right).view(*batch, a.shape[-2], b.shape[-1])

    @implements(aten.mv.default, device=device)
    def mv(a: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """[M, K] x [K]."""
        return mm(a, vector[:, None]).squeeze(-1)

    @implements(aten.dot.default, device=device)
    def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[K] x [K]."""
        return mm(a[None], b[:, None]).view(())


def _checked(
    op: OpOverload, product: Callable[..., torch.Tensor], dims: int
) -> Callable[..., torch.Tensor]:
    """Of operands that torch would multiply, with ``dims`` dims: the last two that are given."""

    @wraps(product)
    def checked(*operands: torch.Tensor, **factors: float) -> torch.Tensor:
        a, b = operands[-2:]
        if a.dtype != b.dtype or a.is_complex():
            raise UnsupportedCallError(f"no product of {a.dtype} and {b.dtype}")
        if (
            (a.dim(), b.dim()) != (dims, dims)
            or operands[0].dtype != a.dtype
            or any(isinstance(factor, complex) for factor in factors.values())
        ):
            op(*operands, **factors)  # Torch says what it refuses.
            raise UnsupportedCallError("operands that torch alone takes")
        check_product(a, b)
        return product(*operands, **factors)

    return checked


def register_grouped_product(
    device: str,
    product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype | None], torch.Tensor],
) -> None:
    """Register the product of rows in groups for a device: `product(a, b, offs, out_dtype)`.

    [M, K] x [G, K, N]: rows up to offs[g] and from the offset before it go through item g.
    """

    @implements(aten._grouped_mm.default, device=device)
    def grouped_mm(
        a: torch.Tensor,
        b: torch.Tensor,
        offs: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        if a.dim() != 2 or b.dim() != 3 or offs is None or bias is not None:
            raise UnsupportedCallError("only rows in groups, without bias")
        return product(a, b, offs, out_dtype)


def combine(
    bias: torch.Tensor, product: torch.Tensor, beta: float, alpha: float, dtype: torch.dtype
) -> torch.Tensor:
    """beta * bias + alpha * product, rounded once; beta = 0 ignores the bias, NaN included."""
    scaled = product if alpha == 1 else product * alpha
    total = scaled if beta == 0 else scaled + bias.to(product.dtype) * beta
    if total.shape != product.shape:
        raise RuntimeError(f"{list(bias.shape)} cannot be added to {list(product.shape)}")
    return total.to(dtype)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
