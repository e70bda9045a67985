"""Torch's ops, and attention, by the Triton kernels: importing this registers them.

Computes: what torch's op of the same name does, in bfloat16, float16 and float32.
Reduction order: that of the kernel behind it; its file says.
Depends on: nothing of the batch. Pointwise ops of real numbers are not registered: a CUDA thread
    computes an element from its own operands by the same instructions wherever it stands.
Not claimed: float64 products and reductions, which are refused.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.compiler import compile_failure
from ndcheck_kernels.cuda.products import matmul
from ndcheck_kernels.cuda.rows import layer_norm as layer_norm_kernels
from ndcheck_kernels.cuda.rows import reductions, rms_norm, softmax
from ndcheck_kernels.ops.attention import as_causal, attention_op, register_sdpa
from ndcheck_kernels.ops.complex_numbers import register_complex
from ndcheck_kernels.ops.products import register_products
from ndcheck_kernels.ops.shapes import normalised_rows
from ndcheck_kernels.scope.extremes import register_extremes, topk
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import accept, implements

aten = torch.ops.aten

# Comparisons give the same result in every order, and these break ties by the lowest index.
accept(
    *(aten.max.default, aten.max.dim, aten.min.default, aten.min.dim),
    *(aten.aminmax.default, aten.argmax.default, aten.argmin.default),
    *(aten.sort.stable, aten.any.default, aten.any.dim, aten.any.dims),
    *(aten.all.default, aten.all.dim, aten.all.dims),
    device="cuda",
)


def covered(call: Callable[..., Any]) -> Callable[..., Any]:
    """What a launcher does not take becomes a refusal that names the op and its module."""

    @wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            reason = compile_failure(error)
            if reason is None and not isinstance(error, TypeError | ValueError):
                raise
            raise UnsupportedCallError(reason or str(error)) from error

    return checked


@covered
def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return matmul.matmul(a, b)


@covered
def _addmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return matmul.matmul(a, b, bias, alpha=alpha, beta=beta)


register_products("cuda", _matmul, _matmul, _addmm, _addmm)
register_extremes("cuda")
register_complex("cuda", torch.cos, torch.sin)


@implements(attention_op, device="cuda")
@covered
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    bias_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[B, H, Q, D] x [B, H_kv, KV, D]; causal spans, windows and chunks, as in `ops.attention`."""
    starts, lengths, window, chunked = as_causal(spans)
    return causal.attention(
        query,
        key,
        value,
        starts=starts,
        lengths=lengths,
        scale=scale,
        window=window,
        chunked=chunked,
        softcap=softcap,
        sinks=sinks,
        slopes=slopes,
        bias_dtype=bias_dtype,
    )


register_sdpa("cuda", attention)


def _reduce(
    call: Callable[..., torch.Tensor],
    x: torch.Tensor,
    dim: int | Sequence[int] | None,
    keepdim: bool,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    return x.to(dtype or x.dtype) if x.dim() == 0 else call(x, dim, keepdim, dtype)


@implements(aten.sum.dim_IntList, device="cuda")
@covered
def sum_dims(
    x: torch.Tensor,
    dim: int | Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sum over dims."""
    return _reduce(reductions.sum, x, dim, keepdim, dtype)


@implements(aten.mean.dim, device="cuda")
@covered
def mean_dims(
    x: torch.Tensor,
    dim: int | Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Mean over dims."""
    return _reduce(reductions.mean, x, dim, keepdim, dtype)


@implements(aten.sum.default, device="cuda")
@covered
def sum_all(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Sum of all elements."""
    return _reduce(reductions.sum, x, None, False, dtype)


@implements(aten.mean.default, device="cuda")
@covered
def mean_all(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Mean of all elements."""
    return _reduce(reductions.mean, x, None, False, dtype)


@implements(aten.cumsum.default, device="cuda")
@covered
def cumsum(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Running sums."""
    return reductions.cumsum(x, dim, dtype)


implements(aten.topk.default, device="cuda")(topk)


@implements(aten.sort.default, device="cuda")
def sort(
    x: torch.Tensor, dim: int = -1, descending: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.sort, stable: the order of ties is part of the result."""
    values, indices = x.sort(dim=dim, descending=descending, stable=True)
    return values, indices


@implements(aten.softmax.int, device="cuda")
@covered
def softmax_over(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Exponentials over their sum."""
    return softmax.softmax(x, dim, dtype)


@implements(aten.log_softmax.int, device="cuda")
@covered
def log_softmax_over(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """log of softmax."""
    return softmax.log_softmax(x, dim, dtype)


@implements(aten._softmax.default, device="cuda")
@covered
def softmax_kernel(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    """What softmax decomposes into."""
    return softmax.softmax(x, dim, torch.float32 if half_to_float else None)


@implements(aten._log_softmax.default, device="cuda")
@covered
def log_softmax_kernel(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    """What log_softmax decomposes into."""
    return softmax.log_softmax(x, dim, torch.float32 if half_to_float else None)


@implements(aten.logsumexp.default, device="cuda")
@covered
def logsumexp(x: torch.Tensor, dim: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    """log of the sum of exponentials over one dim."""
    if len(dim) != 1:
        raise UnsupportedCallError("logsumexp over several dims")
    return softmax.logsumexp(x, dim[0], keepdim)


@implements(aten.layer_norm.default, device="cuda")
@covered
def layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """LayerNorm over the last dims, as torch's on CUDA with parameters of the rows' dtype alone."""
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        raise UnsupportedCallError(f"parameters of another dtype than the rows' {x.dtype}")
    rows = normalised_rows(x, normalized_shape, weight, bias)
    flat = [None if t is None else t.reshape(-1) for t in (weight, bias)]
    return layer_norm_kernels.layer_norm(rows, flat[0], flat[1], eps).view(x.shape)


@implements(aten.rms_norm.default, device="cuda")
@covered
def rms_norm_over(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """RMSNorm over the last dims."""
    rows = normalised_rows(x, normalized_shape, weight)
    eps = torch.finfo(torch.float32).eps if eps is None else eps  # Of what is computed in.
    flat = None if weight is None else weight.reshape(-1)
    return rms_norm.rms_norm(rows, flat, eps).view(x.shape)
