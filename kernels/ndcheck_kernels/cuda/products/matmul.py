"""Matrix product with a K-grouping that never follows the batch.

Computes: y = alpha * a @ b + beta * c, fp32 accumulation, one rounding at the end.
Reduction order: K is cut into S chunks of `chunk_length(K, S)`; a chunk is accumulated by the
    tensor cores in ascending k from zero (fp32 input: one fused multiply-add per k), chunks are
    added in ascending order. S = configs.k_groups(N, K, dtype, capability).
    A schedule may be borrowed: cuBLASLt's, where it was proven to have these bits (`borrowed`);
    or come from a table that was tuned on this machine, of configurations proven here (`proofs`).
Depends on: N, K, dtype, architecture. Not on M, the batch size, the row's position, its
    neighbours, strides or alignment: these only choose tiles and schedule, and the GPU tests hold
    every selectable configuration to one bit class.
Dtypes: bfloat16, float16, float32 (IEEE, no TF32); a, b, c and out share one, or out is fp32.
Not claimed: equality across architectures or Triton versions, float64, gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import (
    MatmulConfig,
    borrows,
    chunk_length,
    k_groups,
    matmul_config,
    pointer_config,
)
from ndcheck_kernels.cuda.dependent_launch import pdl
from ndcheck_kernels.cuda.products import borrowed, matmul_kernels, proofs


def matmul(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, *,
    alpha: float = 1.0, beta: float = 1.0, out: torch.Tensor | None = None,
    width: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """alpha * a @ b + beta * c for [M, K] @ [K, N] or [B, M, K] @ [B, K, N].

    ``out`` may be fp32 whatever the operands: the sum as it is, for one that goes on elsewhere.
    ``width`` gives every column the bits of a product with so many columns, where they are blocks
    of one width side by side.
    """
    dtype = a.dtype
    is_mixed = b.dtype != dtype or (c is not None and c.dtype != dtype)
    if out is not None:
        is_mixed |= out.dtype not in (dtype, torch.float32)
    if dtype not in device.FLOATS or is_mixed:
        raise TypeError(
            f"matmul takes one of {device.FLOATS} throughout, not {a.dtype} @ {b.dtype}"
        )
    if a.dim() != b.dim() or a.dim() not in (2, 3) or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul cannot multiply {tuple(a.shape)} by {tuple(b.shape)}")
    (m, k), n = a.shape[-2:], b.shape[-1] if width is None else width
    size, capability = a.element_size(), device.capability(a.device)
    groups = k_groups(n, k, size, capability)
    config, is_faster_borrowed = proofs.choose(
        a.device, a.dtype, m, (n, k, groups), matmul_config(m, n, k, size, capability),
        borrows(m, n, k, size, capability),
    )  # fmt: skip
    c = c if beta else None
    if is_faster_borrowed and alpha == 1 and (c is None or beta == 1):
        y = _borrow(a, b, c, out, config, groups)
        if y is not None:
            return y
    return _launch(a, b, c, alpha, beta, out, config, groups)


def _borrow(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, out: torch.Tensor | None,
    config: MatmulConfig, groups: int,
) -> torch.Tensor | None:  # fmt: skip
    """The product by cuBLASLt, if it can take it and was seen to have the bits of `config`."""

    def ours(x: torch.Tensor, w: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        return _launch(x, w.t(), addend, 1.0, 1.0, None, config, groups)

    shape = (*a.shape[:-1], b.shape[-1])
    is_added = c is not None and (c.shape != shape or groups > 1)
    if a.dim() != 2 or 0 in shape or is_added:
        return None
    w = b.t()
    if borrowed.is_refused(a, w, c, groups):
        return None
    y = a.new_empty(shape) if out is None else out
    if y.shape != shape or not borrowed.fits(a, w, y, c):
        return None
    return (
        borrowed.product(a, w, y, c, groups) if borrowed.is_proven(a, w, c, groups, ours) else None
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias for x [..., K], weight [N, K]; every leading dimension counts as M."""
    if x.dim() == 2:
        return matmul(x, weight.t(), bias)
    y = matmul(x.reshape(-1, x.shape[-1]), weight.t(), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


class _Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[object, ...]
    """All of the kernel's, in its order."""


_compiled: dict[tuple[object, ...], Any] = {}
"""Kernels by all that Triton would find one by, and all that their operands were checked for.

Both cost the host as much as the launch itself, and a server waits for it wherever its steps are no
CUDA graph.
"""


def _launch(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, alpha: float, beta: float,
    out: torch.Tensor | None, config: MatmulConfig, groups: int,
) -> torch.Tensor:  # fmt: skip
    shape = (*a.shape[:-1], b.shape[-1])
    c = None if c is None else c.expand(shape)
    key = _key(a, b, c, config, groups) if out is None and alpha == beta == 1 else None
    if key is not None and (compiled := _compiled.get(key)) is not None:
        y = torch.empty(shape, dtype=a.dtype, device=a.device)
        _, grid, arguments = _LAUNCHES[config.kind](a, b, c, y, alpha, beta, config, groups)
        compiled[grid](*arguments)
        return y
    if reason := config.refusal(groups):
        raise ValueError(reason)
    y = torch.empty(shape, dtype=a.dtype, device=a.device) if out is None else out
    if y.shape != shape:
        raise ValueError(f"out has shape {tuple(y.shape)}, not {shape}")
    if y.numel() == 0:
        return y
    # A persistent kernel stores through shared memory: no room for fp32 beside its operands.
    is_wide = config.kind == "persistent" and y.element_size() > a.element_size()
    if config.kind != "pointer" and (is_wide or not all(_fits_tma(t) for t in (a, b.mT, y))):
        config = pointer_config(a.shape[-2], a.element_size(), device.capability(a.device))
        config = proofs.unless_shut_out(a.device, a.dtype, (shape[-1], a.shape[-1], groups), config)
        key = None
    kernel, grid, arguments = _LAUNCHES[config.kind](a, b, c, y, alpha, beta, config, groups)
    waits = config.kind != "pointer" and pdl(y.device)["PDL"]
    compiled = kernel[grid](
        *arguments, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        **({"launch_pdl": True} if waits else {}),
    )  # fmt: skip
    if key is not None and compiled is not None:  # The interpreter compiles nothing.
        _compiled[key] = compiled
    return y


def _key(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, config: MatmulConfig, groups: int
) -> tuple[object, ...] | None:
    """Of a launch whose pointers are all aligned; None for what is not kept."""
    pointers = a.data_ptr() | b.data_ptr() | (0 if c is None else c.data_ptr())
    if pointers % 16 or config.kind == "pointer" or config.parallel:
        return None
    addend = None if c is None else c.stride()
    return (config, groups, a.dtype, a.device, a.shape, b.shape, a.stride(), b.stride(), addend)


def _fits_tma(t: torch.Tensor) -> bool:
    """Rows contiguous, and both they and the base aligned to 16 bytes."""
    return (
        t.dim() == 2
        and t.numel() > 0
        and t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
    )


def _descriptor(t: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """As `TensorDescriptor.from_tensor`, whose checks `_fits_tma` has made once."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = t, t.shape, t.stride()
    made.block_shape, made.padding = block, "zero"
    return made


def _pointer_launch(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, y: torch.Tensor,
    alpha: float, beta: float, config: MatmulConfig, groups: int,
) -> _Launch:  # fmt: skip
    (m, k), n = a.shape[-2:], b.shape[-1]
    operands = [t if t.dim() == 3 else t[None] for t in (a, b, y if c is None else c, y)]
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    arguments = (
        *operands, alpha, beta, m, n, k, chunk_length(k, groups),
        *(s for t in operands for s in t.stride()),
        groups, c is not None, config.block_m, config.block_n, config.block_k,
    )  # fmt: skip
    return _Launch(
        matmul_kernels._matmul_pointer_kernel, (tiles, operands[0].shape[0], 1), arguments
    )


def _tile_launch(
    x: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, y: torch.Tensor,
    alpha: float, beta: float, config: MatmulConfig, groups: int,
) -> _Launch:  # fmt: skip
    (m, k), n, w = x.shape, b.shape[1], b.t()
    tiles = -(-m // config.block_m) * -(-n // (config.block_n + config.extra_n))
    partial, counter = y, y  # stand in where nothing is left in parts
    if config.parallel:
        partial = torch.empty((groups, m, n), dtype=torch.float32, device=y.device)
        counter = device.counters(tiles, y.device)
    w_desc = extra_desc = _descriptor(w, [config.block_n, config.block_k])
    if config.extra_n:
        extra_desc = _descriptor(w, [config.extra_n, config.block_k])
    addend = y if c is None else c
    arguments = (
        _descriptor(x, [config.block_m, config.block_k]), w_desc, extra_desc, w, w.stride(0),
        addend, y, partial, counter, alpha, beta, m, n, k, chunk_length(k, groups),
        *addend.stride(), y.stride(0), groups, config.parallel, config.swap, c is not None,
        config.block_m, config.block_n, config.extra_n, config.block_k, config.prefetch,
        pdl(y.device)["PDL"],
    )  # fmt: skip
    return _Launch(
        matmul_kernels._matmul_tile_kernel,
        (tiles * (groups if config.parallel else 1), 1, 1),
        arguments,
    )


def _persistent_launch(
    x: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, y: torch.Tensor,
    alpha: float, beta: float, config: MatmulConfig, groups: int,
) -> _Launch:  # fmt: skip
    (m, k), n = x.shape, b.shape[1]
    programs, addend = device.sm_count(y.device), y if c is None else c
    arguments = (
        _descriptor(x, [config.block_m, config.block_k]),
        _descriptor(b.t(), [config.block_n, config.block_k]),
        _descriptor(y, [config.block_m, config.block_n]),
        addend, alpha, beta, m, n, k, *addend.stride(), programs, c is not None,
        config.block_m, config.block_n, config.block_k, config.swap, config.specialize, _BAND,
        pdl(y.device)["PDL"],
    )  # fmt: skip
    return _Launch(matmul_kernels._matmul_persistent_kernel, (programs, 1, 1), arguments)


_BAND = 8
_LAUNCHES = {
    "pointer": _pointer_launch,
    "tile": _tile_launch,
    "persistent": _persistent_launch,
}
