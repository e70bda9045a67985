"""Batch-invariant matrix products on CPU: torch's own GEMM in shapes proven to be one bit class.

Computes: a row of `a` times `b`, plus a bias where the op has one, rounded once.
Reduction order: that of torch's GEMM of 16 rows at the same (K, N); where that one gives its rows
    different orders, or lets a row see the next one, at K and N filled up with zeros to multiples
    of 64, as K below 32 always is.
Depends on: K, N, dtype, memory layout of `b`, the CPU and torch's build. Never on M, the batch, the
    row's place or its neighbours. The number of threads only matters if torch's 16-row GEMM
    follows it, which no CPU seen so far does.
Dtypes: float64, float32 (IEEE), bfloat16, float16.
Not claimed: invariance in N or K. A product whose *columns* or reduced dimension grow with the
    batch (eager attention over padded keys) is not invariant, only its rows are.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from ndcheck_kernels.cpu.proven_rows import BASE_ROWS, Probe, RowKernel, map_rows
from ndcheck_kernels.ops.products import (
    combine,
    register_grouped_product,
    register_partial_products,
    register_products,
)
from ndcheck_kernels.scope.refusal import UnsupportedCallError

aten = torch.ops.aten

# Beyond 64 rows time is linear in the rows: pieces cost nothing and keep the proofs few.
STEPS = (256, 64)
_PROBE_COLUMNS = 256
_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_IEEE = ("none", "ieee")  # What torch calls not trading float32 products for speed.
_CACHED_ELEMENTS = 2**22
# The widest step of a CPU's matrix units: beyond it no kernel has a tail.
_EVEN = 64
# Fewer terms often have one sum in every order, so that no proof tells their orders apart.
_FEWEST_TERMS = 32


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[M, K] x [K, N]."""
    k, n = b.shape
    if k < 2 or n == 0:
        return _trivial(a, b)
    return _product(a, b, None)


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[M, K] x [K, N], plus [N] where there is a bias; K at least 2, N at least 1."""
    _check(a, b)
    if a.shape[-1] < _FEWEST_TERMS:
        a, b = _add_terms(a, b)
    k, n = b.shape
    b = b.contiguous() if 0 in b.stride() else b  # No proof can write to an expanded operand.
    layout = _layout(b)
    try:
        return map_rows(
            ("mm" if bias is None else "addmm", a.dtype, k, n, layout),
            _row_product(b, bias),
            (a,),
            lambda: _product_probe(k, n, a.dtype, layout, has_bias=bias is not None),
            STEPS,
        )
    except UnsupportedCallError:
        if _is_even(k, n):
            raise
        wide = None if bias is None else F.pad(bias, (0, -n % _EVEN))
        return _product(*_make_even(a, b), wide)[:, :n].contiguous()


def _row_product(b: torch.Tensor, bias: torch.Tensor | None) -> RowKernel:
    if bias is None:
        return lambda rows: torch.mm(rows, b)
    return lambda rows: torch.addmm(bias, rows, b)


def _product_probe(
    k: int, n: int, dtype: torch.dtype, layout: tuple[int, ...], *, has_bias: bool
) -> Probe:
    rows, weight = _noise_operands(k, n, dtype, layout)
    # As small as the noise: a larger bias would swallow it.
    bias = torch.full((n,), torch.finfo(dtype).tiny, dtype=dtype) if has_bias else None
    return Probe((rows,), _row_product(weight, bias))


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[B, M, K] x [B, K, N], each item with the bits of `mm`."""
    batch, k, n = b.shape
    if k < 2 or n == 0 or batch == 0:
        return _trivial(a, b)
    _check(a, b)
    if k < _FEWEST_TERMS:
        return bmm(*_add_terms(a, b))
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
        return combine(bias, mm(*_widen(a, b)), beta, alpha, a.dtype)
    return _product(a, b, bias)


def _baddbmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return combine(bias, bmm(*_widen(a, b)), beta, alpha, a.dtype)


register_products("cpu", mm, bmm, addmm, _baddbmm)


def _grouped_mm(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, out_dtype: torch.dtype | None
) -> torch.Tensor:
    out = a.new_zeros(a.shape[0], b.shape[-1], dtype=out_dtype)
    for group, rows in groups_with_rows(offs):
        out[rows] = mm(a[rows], b[group])
    return out


def groups_with_rows(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have any rows, and which: ``ends`` [E] are where each group's rows end."""
    for group, (start, stop) in enumerate(pairwise([0, *ends.tolist()])):
        if start < stop:
            yield group, slice(start, stop)


register_grouped_product("cpu", _grouped_mm)


def _partial_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # torch's CPU GEMM gives what it takes, so operands are widened: that is exact.
    return mm(*_widen(x, weight.t()))


def _partial_grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return _grouped_mm(*_widen(rows, weight), ends, None)


register_partial_products("cpu", _partial_linear, _partial_grouped)


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype != b.dtype or a.dtype not in _DTYPES:
        raise UnsupportedCallError(f"no product of {a.dtype} and {b.dtype}")
    if a.dtype == torch.float32 and _float32_precision() not in _IEEE:
        raise UnsupportedCallError(
            "float32 must mean IEEE float32: call torch.set_float32_matmul_precision('highest')"
        )


def _float32_precision() -> str:
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return precision


def _trivial(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # One product, or none, per element: nothing to order.
    return a * b if b.shape[-2] == 1 else a.new_zeros(*a.shape[:-1], b.shape[-1])


def _is_even(k: int, n: int) -> bool:
    return k % _EVEN == n % _EVEN == 0


def _add_terms(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros up to as many as a proof can tell apart."""
    more = _EVEN - a.shape[-1]
    return F.pad(a, (0, more)), F.pad(b, (0, 0, 0, more))


def _make_even(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros up to full steps: at odd K or small N the rows of a tile may differ in order, and at K
    that is no multiple of 32 a row may read its neighbour (AMX: 0 times NaN).
    """
    k, n = (-size % _EVEN for size in b.shape)
    return F.pad(a, (0, k)), F.pad(b, (0, n, 0, k))


def _widen(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (a, b) if a.dtype == torch.float64 else (a.float(), b.float())


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
    # Products of float32 numbers are exact in float64, and so are most of their sums.
    draw = partial(torch.randn, generator=generator, dtype=torch.promote_types(dtype, torch.float))
    half = k // 2
    magnitudes = torch.exp2(torch.randint(-6, 7, (BASE_ROWS, half), generator=generator))
    term = (draw(BASE_ROWS, half) * magnitudes).to(dtype)
    factor = draw(half, min(n, _PROBE_COLUMNS)).to(dtype)
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
