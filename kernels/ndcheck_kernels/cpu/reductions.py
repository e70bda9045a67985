"""Batch-invariant reductions, softmaxes and normalisations on CPU.

Computes: sum, mean, var, std, vector norms, logsumexp, softmax, log_softmax, cumsum, LayerNorm and
    RMSNorm, over any dims, in float32 (float64 for float64, and for var and std, whose squares
    would leave float32's range), rounded once.
Reduction order: that of torch's kernel for 16 contiguous rows of the reduced length.
Depends on: the op, the reduced length, dtype, the CPU and torch's build. Never on the other dims,
    the row's place, its neighbours, strides or the number of threads.
Dtypes: float64, float32, bfloat16, float16.
Not claimed: equal results for one row whose reduced length differs, such as a padded one.

Comparisons (max, argmax, sort, any, all) give the same result in every order, and torch
breaks ties row by row: its own kernels are accepted.
"""

from collections.abc import Callable, Sequence

import torch

from ndcheck_kernels.cpu.pointwise import rsqrt
from ndcheck_kernels.cpu.proven_rows import BASE_ROWS, Probe, map_rows
from ndcheck_kernels.ops.shapes import normalised_rows, reduced_dims
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import accept, implements

aten = torch.ops.aten

accept(
    *(aten.max.default, aten.max.dim, aten.min.default, aten.min.dim),
    *(aten.aminmax.default, aten.argmax.default, aten.argmin.default),
    *(aten.sort.default, aten.sort.stable, aten.argsort.default),
    *(aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims),
    *(aten.cummax.default, aten.cummin.default, aten.histc.default),
    device="cpu",
)

Dims = int | Sequence[int] | None


_ADDS = ("sum", "cumsum")


def _row_op(
    name: str, kernel: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """[M, N] -> [M, N or 1], in the accumulation dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    n = wide.shape[-1]
    rows = _noise_rows if name in _ADDS else _tame_rows
    return map_rows(
        (name, wide.dtype, n), kernel, (wide,), lambda: Probe((rows(n, wide.dtype),), kernel)
    )


def _tame_rows(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of exponents none of which dominates."""
    return torch.randn(BASE_ROWS, n, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _noise_rows(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that sum to 0, so that rounding is all that is left."""
    generator = torch.Generator().manual_seed(0)
    half = _tame_rows(n // 2, dtype)
    half *= torch.exp2(torch.randint(-6, 7, half.shape, generator=generator))
    rows = torch.cat([half, -half, half.new_zeros(BASE_ROWS, n % 2)], -1)
    return rows[:, torch.randperm(n, generator=generator)]


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """[M, N] -> [M, 1]."""
    return _row_op("sum", lambda rows: rows.sum(-1, keepdim=True), x)


def _over_dims(
    x: torch.Tensor, dims: Dims, keepdim: bool, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Apply `reduce`, [M, N] -> [M, 1], over any dims."""
    _check_dtype(x)
    given = [dims] if isinstance(dims, int) else list(dims or ())
    if given in ([-1], [x.dim() - 1]) and x.dim():  # By far the most common: skip the bookkeeping.
        out = reduce(x.reshape(x.shape[:-1].numel(), x.shape[-1])).view(*x.shape[:-1], 1)
        return out if keepdim else out.squeeze(-1)
    reduced = reduced_dims(x, dims)
    kept = [d for d in range(x.dim()) if d not in reduced]
    last = x.permute(kept + reduced)
    width = last.shape[len(kept) :].numel()
    out = reduce(last.reshape(last.shape[: len(kept)].numel(), width))
    if keepdim:
        return out.view([1 if d in reduced else x.shape[d] for d in range(x.dim())])
    return out.view(last.shape[: len(kept)])


def _check_dtype(x: torch.Tensor) -> None:
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedCallError(f"no reduction of {x.dtype}")


def _along(
    x: torch.Tensor, dim: int, name: str, kernel: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Apply a shape-preserving row kernel along one dim."""
    _check_dtype(x)
    if x.dim() == 0:
        return _along(x[None], dim, name, kernel)[0]
    last = x.movedim(dim, -1)
    out = _row_op(name, kernel, last.reshape(last.shape[:-1].numel(), last.shape[-1]))
    return out.view(last.shape).movedim(-1, dim)


@implements(aten.sum.dim_IntList, device="cpu")
def sum_dims(
    x: torch.Tensor, dim: Dims, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Sum over dims."""
    return _over_dims(x if dtype is None else x.to(dtype), dim, keepdim, sum_rows).to(
        dtype or x.dtype
    )


@implements(aten.mean.dim, device="cpu")
def mean_dims(
    x: torch.Tensor, dim: Dims, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Sum over dims, divided by their size."""
    if dtype is not None:
        # A sum may leave the range of 16 bits where its mean does not.
        x = x.to(torch.float32 if dtype.itemsize == 2 else dtype)
    total = _over_dims(x, dim, keepdim, lambda r: sum_rows(r).div_(r.shape[-1]))
    return total.to(dtype or x.dtype)


@implements(aten.sum.default, device="cpu")
def sum_all(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Sum of all elements."""
    return sum_dims(x, None, dtype=dtype)


@implements(aten.mean.default, device="cpu")
def mean_all(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Mean of all elements."""
    return mean_dims(x, None, dtype=dtype)


def _variance(x: torch.Tensor, dim: Dims, correction: float | None, keepdim: bool) -> torch.Tensor:
    """In two passes, float64; infinite or NaN without degrees of freedom, as in torch."""

    def variance(rows: torch.Tensor) -> torch.Tensor:
        n = rows.shape[-1]
        rows = rows.double()
        centred = rows - sum_rows(rows).div_(n)
        freedom = n - (1 if correction is None else correction)
        return sum_rows(centred.square_()).div_(max(freedom, 0))

    return _over_dims(x, dim, keepdim, variance)


@implements(aten.var.correction, device="cpu")
def var(
    x: torch.Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> torch.Tensor:
    """Variance."""
    return _variance(x, dim, correction, keepdim).to(x.dtype)


@implements(aten.var_mean.correction, device="cpu")
def var_mean(
    x: torch.Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance, and mean."""
    mean = mean_dims(x.double(), dim, keepdim).to(x.dtype)
    return var(x, dim, correction=correction, keepdim=keepdim), mean


@implements(aten.std.correction, device="cpu")
def std(
    x: torch.Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> torch.Tensor:
    """Standard deviation: the root of the variance before it is rounded."""
    return _variance(x, dim, correction, keepdim).sqrt_().to(x.dtype)


@implements(aten.std_mean.correction, device="cpu")
def std_mean(
    x: torch.Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard deviation, and mean."""
    mean = mean_dims(x.double(), dim, keepdim).to(x.dtype)
    return std(x, dim, correction=correction, keepdim=keepdim), mean


@implements(aten.linalg_vector_norm.default, device="cpu")
def vector_norm(
    x: torch.Tensor,
    order: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The Euclidean norm, or the sum of magnitudes."""
    if order not in (1, 2):
        raise UnsupportedCallError(f"no norm of order {order}")
    _check_dtype(x)
    if dtype is not None and torch.promote_types(x.dtype, dtype) != dtype:
        raise UnsupportedCallError(f"no norm of {x.dtype} in {dtype}")

    def norm(rows: torch.Tensor) -> torch.Tensor:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        if rows.shape[-1] == 1:  # Its square may leave the dtype's range.
            return wide.abs()
        return sum_rows(wide.abs()) if order == 1 else sum_rows(wide * wide).sqrt_()

    x = x if dtype is None else x.to(dtype)
    return _over_dims(x, dim, keepdim, norm).to(x.dtype)


@implements(aten.logsumexp.default, device="cpu")
def logsumexp(x: torch.Tensor, dim: Dims, keepdim: bool = False) -> torch.Tensor:
    """log of the sum of exponentials."""

    def reduce(rows: torch.Tensor) -> torch.Tensor:
        return _row_op("logsumexp", lambda r: r.logsumexp(-1, keepdim=True), rows)

    return _over_dims(x, dim, keepdim, reduce).to(x.dtype)


@implements(aten.softmax.int, device="cpu")
def softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Exponentials over their sum."""
    x = x if dtype is None else x.to(dtype)
    return _along(x, dim, "softmax", lambda r: r.softmax(-1)).to(x.dtype)


@implements(aten.log_softmax.int, device="cpu")
def log_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """log of softmax."""
    x = x if dtype is None else x.to(dtype)
    return _along(x, dim, "log_softmax", lambda r: r.log_softmax(-1)).to(x.dtype)


@implements(aten._softmax.default, device="cpu")
def softmax_kernel(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    """What softmax decomposes into."""
    return softmax(x, dim, torch.float32 if half_to_float else None)


@implements(aten._log_softmax.default, device="cpu")
def log_softmax_kernel(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    """What log_softmax decomposes into."""
    return log_softmax(x, dim, torch.float32 if half_to_float else None)


@implements(aten.cumsum.default, device="cpu")
def cumsum(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Running sum."""
    x = x if dtype is None else x.to(dtype)
    if not (x.is_floating_point() or x.is_complex()):
        return x.cumsum(dim, dtype=dtype)  # Exact in any order.
    return _along(x, dim, "cumsum", lambda r: r.cumsum(-1)).to(x.dtype)


@implements(aten.native_layer_norm.default, device="cpu")
def native_layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm in two passes, with the mean and the reciprocal deviation in the weight's dtype."""
    _check_dtype(x)
    given = {t.dtype for t in (weight, bias) if t is not None} or {x.dtype}
    if given != {x.dtype} and (given != {torch.float32} or x.dtype == torch.float64):
        raise RuntimeError(f"layer_norm of {x.dtype} with parameters of {given}")
    rows = normalised_rows(x, normalized_shape, weight, bias)
    wide = rows if rows.dtype == torch.float64 else rows.float()
    mean = sum_rows(wide).div_(wide.shape[-1])
    centred = wide - mean
    rstd = rsqrt(sum_rows(centred * centred).div_(wide.shape[-1]) + eps)
    out = (centred * rstd).view(x.shape)
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    stats = (*x.shape[: x.dim() - len(normalized_shape)], *[1] * len(normalized_shape))
    (kept,) = given
    return out.to(x.dtype), mean.view(stats).to(kept), rstd.view(stats).to(kept)


@implements(aten.layer_norm.default, device="cpu")
def layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """LayerNorm."""
    return native_layer_norm(x, normalized_shape, weight, bias, eps)[0]


@implements(aten._fused_rms_norm.default, device="cpu")
def fused_rms_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm, with the reciprocal root mean square."""
    _check_dtype(x)
    rows = normalised_rows(x, normalized_shape, weight)
    wide = rows if rows.dtype == torch.float64 else rows.float()
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    rstd = rsqrt(sum_rows(wide * wide).div_(wide.shape[-1]) + eps)
    out = (wide * rstd).view(x.shape)
    stats = (*x.shape[: x.dim() - len(normalized_shape)], *[1] * len(normalized_shape))
    return (out if weight is None else out * weight).to(x.dtype), rstd.view(stats)


@implements(aten.rms_norm.default, device="cpu")
def rms_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """RMSNorm."""
    return fused_rms_norm(x, normalized_shape, weight, eps)[0]
