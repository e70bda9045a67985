"""Products borrowed from cuBLASLt, where they were seen to have the bits of ours.

Computes: what `matmul.matmul` does, by cuBLASLt without split-K. A shape of two K-groups is two
    fp32 products of half of K and one rounded addition.
Reduction order: cuBLASLt's own; that it is ours is a property of its version and the GPU. So a
    shape is borrowed for a number of rows only after a *proof* on this machine: on operands whose
    exact result is 0, so that the result is all rounding, every element must come out as our kernel
    has it; and the same product with K in another order must not, or the operands tell nothing.
    Proofs are kept on disk by everything that could change bits (`proofs`). Where one fails, the
    shape is computed by our kernel from then on, and a warning says so.
Depends on: as `matmul`.
Dtypes: bfloat16, float16.
Not claimed: that it is faster. `configs.borrows` says where it was, on an H200.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from ndcheck_kernels.cuda.configs import chunk_length
from ndcheck_kernels.cuda.products import cublaslt, proofs
from ndcheck_kernels.cuda.products.proofs import Shape

Ours = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x [M, K], w [N, K], addend [M, N] or None -> [M, N], by our kernel."""

ALIGNMENT = 256
"""Bytes: what cuBLASLt's choice of an algorithm takes for granted."""

_verdicts: dict[tuple[object, ...], bool] = {}
_settled = False


def settle(settled: bool = True) -> None:
    """Try no more in this process: a server's requests do not wait for proofs."""
    global _settled
    _settled = settled


def fits(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, addend: torch.Tensor | None) -> bool:
    """Whether cuBLASLt can take these as they lie."""
    if not proofs.is_on_gpu(x.device):
        return False
    tensors = [t for t in (x, w, y, addend) if t is not None]
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and all(t.dtype == x.dtype and t.dim() == 2 and t.stride(1) == 1 for t in tensors)
        and all(t.stride(0) >= t.shape[1] and t.data_ptr() % ALIGNMENT == 0 for t in tensors)
        and all(t.stride(0) * t.element_size() % 16 == 0 for t in tensors)
    )


def is_refused(x: torch.Tensor, w: torch.Tensor, addend: torch.Tensor | None, groups: int) -> bool:
    """Whether nothing of these shapes is borrowed, whatever `fits` says."""
    return not _verdicts.get(_key(x, w, addend, groups), not _settled)


def is_proven(
    x: torch.Tensor, w: torch.Tensor, addend: torch.Tensor | None, groups: int, ours: Ours
) -> bool:
    """Whether the borrowed product of these shapes has our bits; tried if that is not known.

    Nothing is tried while a CUDA graph is captured, or after `settle`: what is unknown then is not
    borrowed.
    """
    key = _key(x, w, addend, groups)
    verdict = _verdicts.get(key)
    if verdict is None:
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if _settled or capturing:
            return False
        with proofs.lock:
            verdict = _verdicts[key] = _try(x, w, addend, groups, ours)
    return verdict


def _key(
    x: torch.Tensor, w: torch.Tensor, addend: torch.Tensor | None, groups: int
) -> tuple[object, ...]:
    return (x.device, x.dtype, x.shape, w.shape[0], groups, addend is None)


def _try(
    x: torch.Tensor, w: torch.Tensor, addend: torch.Tensor | None, groups: int, ours: Ours
) -> bool:
    (m, k), n = x.shape, w.shape[0]
    shape = Shape(n, k, str(x.dtype).removeprefix("torch."), groups, addend is not None)
    try:
        known = proofs.proofs(x.device)
    except cublaslt.UnavailableError as error:
        _warn_once(f"no products are borrowed from cuBLASLt: {error}")
        return False
    if str(shape) not in known.failed and m not in known.proven.get(str(shape), ()):
        try:
            reason = prove(shape, m, x.device, ours)
        except torch.OutOfMemoryError:
            return False  # It says nothing about the shape, and another process may have room.
        if reason is None:
            known.proven.setdefault(str(shape), set()).add(m)
        else:
            known.failed[str(shape)] = reason
        known.write()
    if (reason := known.failed.get(str(shape))) is not None:
        _warn_once(f"{shape} is not borrowed from cuBLASLt: {reason}; our kernel computes it")
        return False
    return True


def prove(shape: Shape, m: int, device: torch.device, ours: Ours) -> str | None:
    """Why `m` rows of a shape cannot be borrowed, or None: they have the bits of ours."""
    x, w = cancelling(m, shape.n, shape.k, getattr(torch, shape.dtype), device)
    addend = None
    if shape.has_addend:
        generator = torch.Generator(device).manual_seed(m)
        addend = torch.randn((m, shape.n), generator=generator, device=device).to(x.dtype) * 2.0**-8
    try:
        got = product(x, w, x.new_empty(m, shape.n), addend, shape.groups)
        if not torch.equal(got, ours(x, w, addend)):
            return f"cuBLASLt has other bits at {m} rows"
        x, w = x.flip(1), w.flip(1)
        other = product(x, w, x.new_empty(m, shape.n), addend, shape.groups)
    except cublaslt.UnavailableError as error:
        return str(error)
    return "another order of K has the same bits" if torch.equal(got, other) else None


def product(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, addend: torch.Tensor | None, groups: int
) -> torch.Tensor:
    """y = x @ w.T + addend in `groups` K-groups, for what `fits`. Raises UnavailableError."""
    if groups == 1:
        return cublaslt.product(x, w, y, addend)
    if groups != 2 or addend is not None:
        raise cublaslt.UnavailableError("only two K-groups, without an addend")
    half = chunk_length(x.shape[1], groups)
    parts = [torch.empty(y.shape, dtype=torch.float32, device=y.device) for _ in range(2)]
    cublaslt.product(x[:, :half], w[:, :half], parts[0])
    cublaslt.product(x[:, half:], w[:, half:], parts[1])
    return torch.add(*parts, out=y)


def cancelling(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] and w [N, K] whose exact product is 0 (of an odd K, its last term).

    What is left of it is rounding, and tells the order in which it was summed.
    """
    generator = torch.Generator(device).manual_seed(m)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    half = k // 2
    order = torch.randperm(k, generator=generator, device=device)
    a, b = draw(m, k - half), draw(n, k - half)
    a *= torch.randint(-5, 6, a.shape, generator=generator, device=device).exp2()
    x = torch.cat([a, a[:, :half]], 1)[:, order].contiguous()
    return x, torch.cat([b, -b[:, :half]], 1)[:, order].contiguous()


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=2)
