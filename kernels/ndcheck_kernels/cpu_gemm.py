"""Batch-invariant matrix products on CPU: torch's own GEMM in shapes proven to be one bit class.

Computes: a row of `a` times `b`, plus a bias where the op has one, rounded once.
Reduction order: that of torch's GEMM of 16 rows at the same (K, N); where that one gives its rows
    different orders, at K and N filled up with zeros to multiples of 16.
Depends on: K, N, dtype, memory layout of `b`, the CPU and torch's build. Never on M, the batch, the
    row's place or its neighbours. The number of threads only matters if torch's 16-row GEMM
    follows it, which no CPU seen so far does.
Dtypes: float64, float32 (IEEE), bfloat16, float16.
Not claimed: invariance in N or K. A product whose *columns* or reduced dimension grow with the
    batch (eager attention over padded keys) is not invariant, only its rows are.
"""

from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F

from ndcheck_kernels.cpu_rows import BASE_ROWS, Probe, map_rows
from ndcheck_kernels.mode import UnsupportedCallError, implements

aten = torch.ops.aten

# Beyond 64 rows time is linear in the rows: pieces cost nothing and keep the proofs few.
STEPS = (256, 64)
_PROBE_COLUMNS = 256
_IEEE = ("none", "ieee")  # What torch calls not trading float32 products for speed.
_CACHED_ELEMENTS = 2**22


@implements(aten.mm.default, device="cpu")
def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[M, K] x [K, N]."""
    k, n = b.shape
    if k < 2 or n == 0:
        return _trivial(a, b)
    _check(a, b)
    b = b.contiguous() if 0 in b.stride() else b  # No proof can write to an expanded operand.
    layout = _layout(b)
    try:
        return map_rows(
            ("mm", a.dtype, k, n, layout),
            lambda rows: torch.mm(rows, b),
            (a,),
            lambda: _mm_probe(k, n, a.dtype, layout),
            STEPS,
        )
    except UnsupportedCallError:
        if _is_even(k, n):
            raise
        return mm(*_make_even(a, b))[:, :n].contiguous()


def _mm_probe(k: int, n: int, dtype: torch.dtype, layout: tuple[int, ...]) -> Probe:
    rows, weight = _noise_operands(k, n, dtype, layout)
    return Probe((rows,), lambda r: torch.mm(r, weight))


@implements(aten.bmm.default, device="cpu")
def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[B, M, K] x [B, K, N], each item with the bits of `mm`."""
    batch, k, n = b.shape
    if k < 2 or n == 0 or batch == 0:
        return _trivial(a, b)
    _check(a, b)
    if b.stride()[1:] not in ((n, 1), (1, k)):
        b = b.contiguous()  # The proof knows items without gaps only.
    layout = _layout(b)[1:]
    try:
        return map_rows(
            ("bmm", a.dtype, k, n, layout, batch),
            lambda rows: torch.bmm(rows, b),
            (a,),
            lambda: _bmm_probe(batch, k, n, a.dtype, layout),
            STEPS,
        )
    except UnsupportedCallError:
        return torch.stack([mm(a[i], b[i]) for i in range(batch)])


def _bmm_probe(batch: int, k: int, n: int, dtype: torch.dtype, layout: tuple[int, ...]) -> Probe:
    rows, weight = _noise_operands(k, n, dtype, layout)
    # Each batch item has the rows in another order: no place can hide behind equal contents.
    turned = torch.stack([rows.roll(i, 0) for i in range(batch)])
    transposed = layout[0] == 1
    stored = (weight.t() if transposed else weight).expand(batch, -1, -1).contiguous()
    weights = stored.transpose(1, 2) if transposed else stored
    return Probe(
        (turned,),
        lambda r: torch.bmm(r, weights),
        lambda r: torch.stack([torch.mm(item, weight) for item in r]),
    )


@implements(aten.linear.default, device="cpu")
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[..., K] x [N, K]^T + [N]."""
    if weight.dim() != 2:
        return matmul(x, weight.t()) if bias is None else matmul(x, weight.t()) + bias
    rows = _as_rows(x)
    out = mm(rows, weight.t()) if bias is None else addmm(bias, rows, weight.t())
    return out.view(*x.shape[:-1], weight.shape[0])


@implements(aten.addmm.default, device="cpu")
def addmm(
    bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    """beta * bias + alpha * (a x b)."""
    k, n = b.shape
    if k < 2 or n == 0 or bias.shape != (n,) or (beta, alpha) != (1, 1) or bias.dtype != a.dtype:
        return _combine(bias, mm(*_widen(a, b)), beta, alpha, a.dtype)
    _check(a, b)
    b = b.contiguous() if 0 in b.stride() else b
    layout = _layout(b)
    try:
        return map_rows(
            ("addmm", a.dtype, k, n, layout),
            lambda rows: torch.addmm(bias, rows, b),
            (a,),
            lambda: _addmm_probe(k, n, a.dtype, layout),
            STEPS,
        )
    except UnsupportedCallError:
        if _is_even(k, n):
            raise
        padded = addmm(F.pad(bias, (0, -n % BASE_ROWS)), *_make_even(a, b))
        return padded[:, :n].contiguous()


def _addmm_probe(k: int, n: int, dtype: torch.dtype, layout: tuple[int, ...]) -> Probe:
    rows, weight = _noise_operands(k, n, dtype, layout)
    # As small as the noise: a larger bias would swallow it.
    bias = torch.full((n,), torch.finfo(dtype).tiny, dtype=dtype)
    return Probe((rows,), lambda r: torch.addmm(bias, r, weight))


@implements(aten.baddbmm.default, device="cpu")
def baddbmm(
    bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    """beta * bias + alpha * (a x b), batched."""
    return _combine(bias, bmm(*_widen(a, b)), beta, alpha, a.dtype)


@implements(aten.matmul.default, device="cpu")
def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of torch.matmul; a vector on the left is one row."""
    if a.dim() == 1:
        return matmul(a[None], b).squeeze(-2 if b.dim() > 1 else 0)
    if b.dim() == 1:
        return matmul(a, b[:, None]).squeeze(-1)
    if b.dim() == 2:
        return mm(_as_rows(a), b).view(*a.shape[:-1], b.shape[-1])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    left = a.expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
    right = b.expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
    return bmm(left, right).view(*batch, a.shape[-2], b.shape[-1])


@implements(aten.mv.default, device="cpu")
def mv(a: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """[M, K] x [K]."""
    return mm(a, vector[:, None]).squeeze(-1)


@implements(aten.dot.default, device="cpu")
def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[K] x [K]."""
    return mm(a[None], b[:, None]).view(())


@implements(aten._grouped_mm.default, device="cpu")
def grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[M, K] x [G, K, N]: rows up to offs[g] and from the offset before it go through item g."""
    if a.dim() != 2 or b.dim() != 3 or offs is None or bias is not None:
        raise UnsupportedCallError("only rows in groups, without bias")
    out = a.new_zeros(a.shape[0], b.shape[-1], dtype=out_dtype)
    starts = [0, *offs.tolist()]
    for group, (start, stop) in enumerate(pairwise(starts)):
        if start < stop:
            out[start:stop] = mm(a[start:stop], b[group])
    return out


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype != b.dtype or a.dtype not in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        raise UnsupportedCallError(f"no product of {a.dtype} and {b.dtype}")
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    if a.dtype == torch.float32 and precision not in _IEEE:
        raise UnsupportedCallError(
            "float32 must mean IEEE float32: call torch.set_float32_matmul_precision('highest')"
        )


def _trivial(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # One product, or none, per element: nothing to order.
    return a * b if b.shape[-2] == 1 else a.new_zeros(*a.shape[:-1], b.shape[-1])


def _is_even(k: int, n: int) -> bool:
    return k % BASE_ROWS == n % BASE_ROWS == 0


def _make_even(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros up to multiples of 16: at odd K or small N the rows of a tile may differ in order."""
    k, n = (-size % BASE_ROWS for size in b.shape)
    return F.pad(a, (0, k)), F.pad(b, (0, n, 0, k))


def _widen(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (a, b) if a.dtype == torch.float64 else (a.float(), b.float())


def _combine(
    bias: torch.Tensor, product: torch.Tensor, beta: float, alpha: float, dtype: torch.dtype
) -> torch.Tensor:
    scaled = product if alpha == 1 else product * alpha
    # beta = 0 ignores the bias, NaN included.
    total = scaled if beta == 0 else scaled + bias.to(product.dtype) * beta
    return total.to(dtype)


def _layout(b: torch.Tensor) -> tuple[int, ...]:
    """Strides, and where in a cache line the data starts: kernels may branch on either."""
    return (*b.stride(), b.data_ptr() % 64 // b.element_size())


def _noise_operands(
    k: int, n: int, dtype: torch.dtype, layout: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    make = _cached_noise if k * n <= _CACHED_ELEMENTS else _cached_noise.__wrapped__
    return make(k, n, dtype, layout)


@lru_cache(maxsize=16)
def _cached_noise(
    k: int, n: int, dtype: torch.dtype, layout: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[BASE_ROWS, K] and [K, N] with product 0: each term comes twice, with opposite signs."""
    *strides, offset = layout
    generator = torch.Generator().manual_seed(0)
    half = k // 2
    magnitudes = torch.exp2(torch.randint(-6, 7, (BASE_ROWS, half), generator=generator).float())
    term = (torch.randn(BASE_ROWS, half, generator=generator) * magnitudes).to(dtype)
    factor = torch.randn(half, min(n, _PROBE_COLUMNS), generator=generator).to(dtype)
    place = torch.randperm(k, generator=generator)
    rows = torch.zeros(BASE_ROWS, k, dtype=dtype)
    columns = torch.zeros(k, factor.shape[1], dtype=dtype)
    rows[:, place[:half]], rows[:, place[half : 2 * half]] = term, -term
    columns[place[:half]] = columns[place[half : 2 * half]] = factor
    extent = 1 + sum((size - 1) * stride for size, stride in zip((k, n), strides, strict=True))
    storage = torch.zeros(offset + extent, dtype=dtype)
    weight = storage.as_strided((k, n), strides, offset)
    weight.copy_(columns[:, torch.arange(n) % columns.shape[1]])
    return rows, weight
