"""Batch-invariant pointwise ops on CPU, for functions that a scalar and a vector round differently.

Computes: any pointwise aten op, element by element.
Reduction order: none; but torch's loops use another algorithm for the last elements of a piece,
    for strided memory and at the cuts between threads.
Depends on: the op, its scalars, dtype, the CPU and torch's build. Never on the element's place, the
    tensor's shape, strides or size.
Dtypes: those of the op.
Not claimed: the memory format of the result, which is contiguous.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch._ops import OpOverload

from ndcheck_kernels.cpu.proven_rows import BASE_ROWS, Probe, map_rows
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import implements, implements_pointwise

aten = torch.ops.aten

# Two of the widest registers full of the narrowest float: torch's vector loops take such steps.
LANES = 64
# Torch's loops are cut into one piece per thread from this many elements on.
_GRAIN = 32768


@implements_pointwise(device="cpu")
def pointwise(op: OpOverload, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`op` with every element in a full vector: operands flattened to rows of `LANES`, padded."""
    if len(op._schema.returns) != 1:
        raise UnsupportedCallError("several results")
    if any(isinstance(a, torch.Tensor) and a.is_complex() for a in args):
        raise UnsupportedCallError("complex arithmetic rounds several times")
    if len(args) == 1 and not kwargs:  # By far the most common: skip the bookkeeping.
        (x,) = args
        # By what torch made in C++: an overload is hashed, and called, in Python.
        return _map_elements((op._op, x.dtype), op._op, [x], x.shape)
    if any(isinstance(v, torch.Tensor) for v in kwargs.values()):
        names = [a.name for a in op._schema.arguments if not a.kwarg_only]
        args = (*args, *(kwargs.pop(name, None) for name in names[len(args) :]))
        if any(isinstance(v, torch.Tensor) for v in kwargs.values()):
            raise UnsupportedCallError("tensors as keyword arguments")
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    # A tensor without dimensions takes no part in type promotion: it must stay one.
    wide = [t for t in tensors if t.dim()] or tensors

    def kernel(*rows: torch.Tensor) -> torch.Tensor:
        remaining = iter(rows)
        call = [
            next(remaining) if isinstance(a, torch.Tensor) and (a.dim() or not shape) else a
            for a in args
        ]
        return op(*call, **kwargs)

    scalars = (a for a in args if not isinstance(a, torch.Tensor))
    identity = (op, *(t.dtype for t in tensors), *scalars, *kwargs.items())
    return _map_elements(identity, kernel, [t.expand(shape) for t in wide], shape)


def _map_elements(
    identity: tuple[Hashable, ...],
    kernel: Callable[..., torch.Tensor],
    operands: list[torch.Tensor],
    shape: torch.Size,
) -> torch.Tensor:
    total = shape.numel()
    size = _padded_size(total)
    rows = tuple(_to_rows(t, total, size) for t in operands)
    out = map_rows(identity, kernel, rows, lambda: _probe(kernel, operands))
    if size != total:
        out = out.view(-1)[:total]
    return out.view(shape)


def _padded_size(total: int) -> int:
    """Full vectors for every thread that torch will use."""
    size = total
    while True:
        threads = max(1, min(torch.get_num_threads(), -(-size // _GRAIN)))
        padded = -(-size // (LANES * threads)) * LANES * threads
        if padded == size:
            return size
        size = padded


def _to_rows(tensor: torch.Tensor, total: int, size: int) -> torch.Tensor:
    flat = tensor.reshape(-1)
    if size != total:
        padded = flat.new_ones(size)
        padded[:total] = flat
        flat = padded
    return flat.view(-1, LANES)


def _probe(kernel: Any, operands: list[torch.Tensor]) -> Probe:
    generator = torch.Generator().manual_seed(0)
    shape = BASE_ROWS, LANES
    values = [torch.randn(shape, generator=generator, dtype=torch.double) * 3 for _ in operands]
    return Probe(tuple(v.to(t.dtype) for v, t in zip(values, operands, strict=True)), kernel)


@implements(aten.rsqrt.default, device="cpu")
def rsqrt(x: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(x), by the two operations that IEEE rounds correctly."""
    if x.is_complex():
        raise UnsupportedCallError("complex arithmetic rounds several times")
    wide = x if x.dtype == torch.float64 else x.float()
    # Of integers torch makes floats.
    return wide.sqrt().reciprocal_().to(x.dtype if x.is_floating_point() else wide.dtype)


@implements(aten.pow.Tensor_Scalar, device="cpu")
def pow_scalar(x: torch.Tensor, exponent: float) -> torch.Tensor:
    """x ** exponent; a square is one product."""
    is_square = exponent == 2 and x.is_floating_point()
    return x * x if is_square else pointwise(aten.pow.Tensor_Scalar, x, exponent)
