"""What torch refuses of a call before it computes, where an implementation would give numbers."""

from collections.abc import Sequence

import torch


def reduced_dims(x: torch.Tensor, dims: int | Sequence[int] | None) -> list[int]:
    """The dims to reduce, ascending and not negative; none named are all.

    Raises IndexError for one that x does not have, RuntimeError for one that is named twice.
    """
    named = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
    n = max(x.dim(), 1)
    for dim in named:
        if not -n <= dim < n:
            raise IndexError(f"Dimension {dim} of {x.dim()}; accepted are {-n} to {n - 1}")
    reduced = sorted({dim % n for dim in named})
    if len(reduced) < len(named):
        raise RuntimeError(f"a dim appears multiple times in the list of dims: {named}")
    return reduced if x.dim() else []


def normalised_rows(
    x: torch.Tensor, shape: Sequence[int], *parameters: torch.Tensor | None
) -> torch.Tensor:
    """x as [M, N], its last dims as the row; raises RuntimeError where they are not ``shape``, or
    a parameter's are not."""
    shape = torch.Size(shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise RuntimeError(
            f"Given normalized_shape={list(shape)}, expected input with these last dims, but got "
            f"input of size {list(x.shape)}"
        )
    for parameter in parameters:
        if parameter is not None and parameter.shape != shape:
            raise RuntimeError(
                f"Expected weight and bias of shape {list(shape)}, but got {list(parameter.shape)}"
            )
    return x.reshape(x.shape[: x.dim() - len(shape)].numel(), shape.numel())


def check_product(a: torch.Tensor, b: torch.Tensor) -> None:
    """Raise RuntimeError unless [M, K] x [K, N], or as many of them; one column is not many."""
    if a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        raise RuntimeError(f"shapes cannot be multiplied ({list(a.shape)} and {list(b.shape)})")
