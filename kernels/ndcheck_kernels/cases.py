"""What each op is measured on: operands for any number of rows, the call, its specification.

A case calls torch's own op, so one case serves both arms, inside `invariant_kernels()` and outside,
on any device. Two kinds of operands: *noise*, whose result is little but rounding, so that another
order of summation shows in its bits, and *wide*, of wide range, for accuracy and time. Random
operands alone would hide an order: rounding to bfloat16 removes what it changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, starmap

import torch
import torch.nn.functional as F

from ndcheck_kernels.attention_interface import attention_op, causal_spans
from ndcheck_kernels.mode import active_scope
from ndcheck_kernels.reference import (
    addmm_reference,
    attention_reference,
    cumsum_reference,
    layer_norm_reference,
    linear_reference,
    log_softmax_reference,
    logsumexp_reference,
    mean_reference,
    rms_norm_reference,
    softmax_reference,
    sum_reference,
)

aten = torch.ops.aten

Tensors = tuple[torch.Tensor, ...]
Call = Callable[..., torch.Tensor]

EPS = 1e-6
LEVELS = 64  # few, so that equal values are sure to compete for an index
BATCH = 2  # items of the batched products
SORTED = 256  # columns
MOST_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """Draws tensors of one dtype on one device, the same ones for the same seed."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    @classmethod
    def seeded(cls, dtype: torch.dtype, device: torch.device, seed: int = 0) -> "Source":
        return cls(dtype, device, torch.Generator(device).manual_seed(seed))

    def normal(self, *shape: int) -> torch.Tensor:
        return self._randn(shape).to(self.dtype)

    def wide(self, *shape: int, binades: int = 5) -> torch.Tensor:
        """Normal draws times powers of two: none dominates, and none is small beside all."""
        scale = self._integers(-binades, binades + 1, shape).exp2()
        return (self._randn(shape) * scale).to(self.dtype)

    def cancelling(self, m: int, k: int) -> torch.Tensor:
        """Rows [M, K] that sum to exactly 0."""
        half = self.wide(m, k // 2)
        return torch.cat([half, -half], 1)[:, self.order(k)]

    def running_out(self, m: int, k: int) -> torch.Tensor:
        """Rows [M, K] of which every eight values in a row sum to exactly 0."""
        half = self.wide(m, k // 8, 4, binades=10)  # fewer binades would sum without rounding
        return torch.cat([half, -half], -1)[..., self.order(8)].reshape(m, k)

    def absorbing(self, m: int, k: int, top: float, low: float, high: float) -> torch.Tensor:
        """Rows of one `top`, then values that it absorbs one by one but not their sum."""
        rows = torch.rand(m, k, generator=self.generator, device=self.device) * (high - low) + low
        rows[:, 0] = top
        return rows.to(self.dtype)

    def levels(self, m: int, k: int) -> torch.Tensor:
        return self._integers(0, LEVELS, (m, k)).to(self.dtype)

    def order(self, k: int) -> torch.Tensor:
        return torch.randperm(k, generator=self.generator, device=self.device)

    def _randn(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _integers(self, low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        drawn = torch.randint(low, high, shape, generator=self.generator, device=self.device)
        return drawn.float()


@dataclass(frozen=True, slots=True)
class Operands:
    """`rows` are [M, ...] each and follow the batch; `fixed` do not."""

    rows: Tensors
    fixed: Tensors = ()

    def first(self, m: int) -> Tensors:
        """The arguments of a call for the first `m` rows."""
        return (*(r[:m] for r in self.rows), *self.fixed)


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one shape."""

    op: str
    shape: str
    fires: str
    """What `Scope.fires` counts when the op is overridden."""
    operands: Callable[[Source, int, bool], Operands]
    """From a source, the number of rows, and whether noise is wanted rather than wide range."""
    call: Call
    """Takes rows and fixed operands; the result has the rows in dim 0."""
    reference: Call
    grouped: Call
    """A planted fault: takes a number of groups first, and sums in so many. The float result is the
    same, its bits are not."""
    flops_per_row: int = 0
    """0 where memory is what counts."""
    max_rows: int = MOST_ROWS


def sum_in_groups(groups: int, x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> [..., 1] in float32, each group of K summed by itself."""
    return sum(  # type: ignore[return-value]
        part.sum(-1, keepdim=True) for part in x.float().chunk(groups, -1)
    )


# Products


def _product_operands(n: int, k: int) -> Callable[[Source, int, bool], Operands]:
    """x [M, K]; w [N, K] and a bias [N], which is 0 beside noise, since it would swallow it."""

    def draw(source: Source, m: int, noise: bool) -> Operands:
        if not noise:
            return Operands((source.wide(m, k),), (source.normal(n, k), source.normal(n)))
        x, w = source.wide(m, k // 2), source.normal(n, k // 2)
        order = source.order(k)
        x, w = torch.cat([x, -x], 1)[:, order], torch.cat([w, w], 1)[:, order]
        return Operands((x,), (w, w.new_zeros(n)))

    return draw


def _batched_operands(n: int, k: int) -> Callable[[Source, int, bool], Operands]:
    """x [M, BATCH, K], w [BATCH, N, K], bias [N]."""

    def draw(source: Source, m: int, noise: bool) -> Operands:
        plain = _product_operands(n, k)(source, m, noise)
        (x,), (w, bias) = plain.rows, plain.fixed
        return Operands((torch.stack([x] * BATCH, 1),), (torch.stack([w] * BATCH), bias))

    return draw


def _product_in_groups(call: Call) -> Call:
    def grouped(groups: int, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        parts = zip(x.float().chunk(groups, -1), w.float().chunk(groups, -1), strict=True)
        total = sum(call(a.contiguous(), b.contiguous(), bias.float()) for a, b in parts)
        return total.to(x.dtype)  # type: ignore[union-attr]

    return grouped


def _mm_out(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, w.t(), out=x.new_empty(len(x), len(w)))


def _bmm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1)


def _baddbmm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(bias, x.transpose(0, 1), w.transpose(1, 2), beta=0.5, alpha=2).transpose(
        0, 1
    )


def _bmm_reference(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.stack([linear_reference(x[:, i], w[i]) for i in range(BATCH)], 1)


def _baddbmm_reference(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    left, right = x.transpose(0, 1), w.transpose(1, 2)
    return addmm_reference(bias, left, right, beta=0.5, alpha=2).transpose(0, 1)


def _linear_reference(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return linear_reference(x, w)


# op: what fires, the call, its reference.
_PRODUCTS: dict[str, tuple[str, Call, Call]] = {
    "linear": ("linear", lambda x, w, bias: F.linear(x, w), _linear_reference),
    "linear_bias": ("linear", F.linear, linear_reference),
    "mm": ("mm", lambda x, w, bias: torch.mm(x, w.t()), _linear_reference),
    "mm_out": ("mm", _mm_out, _linear_reference),
    "addmm": (
        "addmm",
        lambda x, w, bias: torch.addmm(bias, x, w.t(), beta=0.5, alpha=2),
        lambda x, w, bias: addmm_reference(bias, x, w.t(), beta=0.5, alpha=2),
    ),
    "matmul": ("matmul", lambda x, w, bias: (x[:, None] @ w.t())[:, 0], _linear_reference),
    "einsum": ("bmm", lambda x, w, bias: torch.einsum("mk,nk->mn", x, w), _linear_reference),
    "mv": (
        "mv",
        lambda x, w, bias: torch.mv(x, w[0]),
        lambda x, w, bias: linear_reference(x, w[0][None])[:, 0],
    ),
    "grouped_mm": (
        "_grouped_mm",
        lambda x, w, bias: torch._grouped_mm(
            x,
            w.t()[None].contiguous(),
            torch.tensor([len(x)], dtype=torch.int32, device=x.device),
        ),
        _linear_reference,
    ),
}
_BATCHED: dict[str, tuple[str, Call, Call]] = {
    "bmm": ("bmm", _bmm, _bmm_reference),
    "baddbmm": ("baddbmm", _baddbmm, _baddbmm_reference),
}


def products(n: int, k: int) -> tuple[Case, ...]:
    """Every form of a product of rows with a weight [N, K]; K is even."""
    return tuple(
        Case(
            op, f"{n}x{k}", fires, operands(n, k), call, reference, _product_in_groups(call),
            flops_per_row=2 * batch * n * k,
        )
        for forms, operands, batch in (
            (_PRODUCTS, _product_operands, 1),
            (_BATCHED, _batched_operands, BATCH),
        )
        for op, (fires, call, reference) in forms.items()
    )  # fmt: skip


# Row operations: x [M, K], w [K], bias [K] -> [M, K] or [M]

RowDraw = Callable[[Source, int, int], torch.Tensor]


def _cancelling(source: Source, m: int, k: int) -> torch.Tensor:
    return source.cancelling(m, k)


def _running_out(source: Source, m: int, k: int) -> torch.Tensor:
    return source.running_out(m, k)


def _logits(source: Source, m: int, k: int) -> torch.Tensor:
    return source.absorbing(m, k, 0, -10, -8)


def _steep_logits(source: Source, m: int, k: int) -> torch.Tensor:
    """Their exponentials are near half a unit in the last place of the first one's, 1."""
    return source.absorbing(m, k, 0, -17.5, -16.5)


def _outlier(source: Source, m: int, k: int) -> torch.Tensor:
    """Their squares are just below half a unit in the last place of the first one's."""
    rows = source.absorbing(m, k, 4128, 0.7, 1)
    rows[:, 1] = -4128
    rows[:, 2::2] *= -1  # the mean is near 0
    return rows


def _levels(source: Source, m: int, k: int) -> torch.Tensor:
    return source.levels(m, k)


def _row_operands(k: int, noise_rows: RowDraw) -> Callable[[Source, int, bool], Operands]:
    def draw(source: Source, m: int, noise: bool) -> Operands:
        tied = noise_rows is _levels
        x = noise_rows(source, m, k) if noise or tied else source.wide(m, k)
        bias = source.normal(k) * (not noise)  # beside noise 0, since it would swallow it
        return Operands((x,), (source.normal(k), bias))

    return draw


def _softmax_in(groups: int, x: torch.Tensor) -> torch.Tensor:
    powers = (x.float() - x.float().amax(-1, keepdim=True)).exp()
    return powers / sum_in_groups(groups, powers)


def _logsumexp_in(groups: int, x: torch.Tensor) -> torch.Tensor:
    top = x.float().amax(-1, keepdim=True)
    return top + sum_in_groups(groups, (x.float() - top).exp()).log()


def _rms_norm_in(groups: int, x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return wide / (sum_in_groups(groups, wide * wide) / x.shape[-1] + EPS).sqrt()


def _centred_in(groups: int, x: torch.Tensor) -> torch.Tensor:
    return x.float() - sum_in_groups(groups, x) / x.shape[-1]


def _cumsum_in(groups: int, x: torch.Tensor) -> torch.Tensor:
    parts = [part.cumsum(-1) for part in x.float().chunk(groups, -1)]
    for before, part in pairwise(parts):
        part += before[:, -1:]
    return torch.cat(parts, -1).to(x.dtype)


def _last_index(groups: int, x: torch.Tensor) -> torch.Tensor:
    """The fault of an exact op: of equal values, the last one's index."""
    return x.argmax(-1) if groups == 1 else x.shape[-1] - 1 - x.flip(-1).argmax(-1)


def _order(x: torch.Tensor) -> torch.Tensor:
    return torch.sort(x[:, :SORTED], dim=-1, descending=True, stable=True).indices


def _order_in(groups: int, x: torch.Tensor) -> torch.Tensor:
    x = x[:, :SORTED]
    return _order(x) if groups == 1 else x.shape[-1] - 1 - _order(x.flip(-1))


# op: what it is called on, the call, its reference, its planted fault.
_ROW_OPS: dict[str, tuple[RowDraw, Call, Call, Call]] = {
    "sum": (
        _cancelling,
        lambda x, w, b: x.sum(-1),
        lambda x, w, b: sum_reference(x, -1),
        lambda groups, x, w, b: sum_in_groups(groups, x).to(x.dtype),
    ),
    "cumsum": (
        _running_out,
        lambda x, w, b: x.cumsum(-1),
        lambda x, w, b: cumsum_reference(x),
        lambda groups, x, w, b: _cumsum_in(groups, x),
    ),
    "log_softmax": (
        _steep_logits,
        lambda x, w, b: x.log_softmax(-1),
        lambda x, w, b: log_softmax_reference(x),
        lambda groups, x, w, b: (x.float() - _logsumexp_in(groups, x)).to(x.dtype),
    ),
    "logsumexp": (
        _steep_logits,
        lambda x, w, b: x.logsumexp(-1),
        lambda x, w, b: logsumexp_reference(x),
        lambda groups, x, w, b: _logsumexp_in(groups, x).to(x.dtype),
    ),
    "layer_norm": (
        _outlier,
        lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS),
        lambda x, w, b: layer_norm_reference(x, w, b, EPS),
        lambda groups, x, w, b: (_rms_norm_in(groups, _centred_in(groups, x)) * w + b).to(x.dtype),
    ),
    "rms_norm": (
        _outlier,
        lambda x, w, b: F.rms_norm(x, w.shape, w, EPS),
        lambda x, w, b: rms_norm_reference(x, w, EPS),
        lambda groups, x, w, b: (_rms_norm_in(groups, x) * w).to(x.dtype),
    ),
    # These give float32: in less, rounding would hide the order of terms that do not cancel, and
    # underflow that of a mean.
    "mean": (
        _cancelling,
        lambda x, w, b: x.mean(-1, dtype=torch.float32),
        lambda x, w, b: mean_reference(x, -1),
        lambda groups, x, w, b: sum_in_groups(groups, x) / x.shape[-1],
    ),
    "softmax": (
        _logits,
        lambda x, w, b: x.softmax(-1, dtype=torch.float32),
        lambda x, w, b: softmax_reference(x),
        lambda groups, x, w, b: _softmax_in(groups, x),
    ),
    "var": (
        _outlier,
        lambda x, w, b: x.float().var(-1, correction=0),
        lambda x, w, b: x.double().var(-1, correction=0),
        lambda groups, x, w, b: sum_in_groups(groups, _centred_in(groups, x).square()),
    ),
    "vector_norm": (
        _outlier,
        lambda x, w, b: torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32),
        lambda x, w, b: torch.linalg.vector_norm(x.double(), dim=-1),
        lambda groups, x, w, b: sum_in_groups(groups, x.float().square()).sqrt(),
    ),
    "argmax": (
        _levels,
        lambda x, w, b: x.argmax(-1),
        lambda x, w, b: x.double().argmax(-1),
        lambda groups, x, w, b: _last_index(groups, x),
    ),
    "sort": (
        _levels,
        lambda x, w, b: _order(x),
        lambda x, w, b: _order(x.double()),
        lambda groups, x, w, b: _order_in(groups, x),
    ),
}
_FIRES = {"vector_norm": "linalg_vector_norm"}


def row_ops(k: int, max_rows: int = MOST_ROWS) -> tuple[Case, ...]:
    """Reductions, normalisations and orders over rows of even K."""
    return tuple(
        Case(
            op, str(k), _FIRES.get(op, op), _row_operands(k, draw), call, reference, grouped,
            max_rows=max_rows,
        )
        for op, (draw, call, reference, grouped) in _ROW_OPS.items()
    )  # fmt: skip


# Attention: q [M, H, Q, D], k and v [M, H_kv, KV, D], spans [M, 1, 2] -> [M, H, Q, D]


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor
) -> torch.Tensor:
    """What a transformers model calls: an op of its own in the scope, torch's outside."""
    if active_scope() is None:
        return _sdpa(q, k, v, spans)
    result: torch.Tensor = attention_op(q, k, v, spans, q.shape[-1] ** -0.5)
    return result


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    # One query sees every key: without a mask it is the same problem, and faster.
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def _attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor
) -> torch.Tensor:
    return attention_reference(q, k, v, spans, q.shape[-1] ** -0.5)


def _attention_in(
    groups: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor
) -> torch.Tensor:
    k, v = (t.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q.float() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], device=q.device).triu(1 + k.shape[2] - q.shape[2])
    scores = scores.masked_fill(hidden.bool(), -torch.inf)
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    parts = zip(powers.chunk(groups, -1), v.chunk(groups, -2), strict=True)
    total = sum(p.contiguous() @ values.contiguous() for p, values in parts)
    return (total / sum_in_groups(groups, powers)).to(q.dtype)


def _attention_operands(
    heads: int, kv_heads: int, head_dim: int, queries: int, context: int
) -> Callable[[Source, int, bool], Operands]:
    def draw(source: Source, m: int, noise: bool) -> Operands:
        q = source.normal(m, heads, queries, head_dim)
        spans = causal_spans(m, context, source.device)
        if not noise:
            k, v = (source.normal(m, kv_heads, context, head_dim) for _ in range(2))
            return Operands((q, k, v, spans))
        # Each key twice, with opposite values: whoever sees both gets exactly 0 from them.
        k, v = (source.wide(m, kv_heads, context // 2, head_dim) for _ in range(2))
        k = k / 64  # tame scores: no key may drown the others
        order = source.order(context)
        k, v = torch.cat([k, k], 2)[:, :, order], torch.cat([v, -v], 2)[:, :, order]
        return Operands((q, k, v, spans))

    return draw


def attention(
    heads: int,
    kv_heads: int,
    head_dim: int,
    context: int,
    prefill: int,
    max_rows: tuple[int, int] = (64, 16),
) -> tuple[Case, ...]:
    """Decode over `context` keys, and prefill of `prefill` tokens, both even."""
    cases = []
    for op, queries, keys, rows in (
        ("decode", 1, context, max_rows[0]),
        ("prefill", prefill, prefill, max_rows[1]),
    ):
        operands = _attention_operands(heads, kv_heads, head_dim, queries, keys)
        work = 4 * heads * head_dim * queries * keys // (1 if queries == 1 else 2)
        for name, fires, call in (
            (op, "attention", _attention),
            (f"sdpa_{op}", "scaled_dot_product_attention", _sdpa),
        ):
            cases.append(
                Case(
                    name, f"{heads}/{kv_heads}x{head_dim} {keys}", fires, operands, call,
                    _attention_reference, _attention_in,
                    flops_per_row=work, max_rows=rows,
                )
            )  # fmt: skip
    return tuple(cases)


# What is measured where

TIMED = (
    *("linear", "addmm", "bmm", "sum", "mean", "softmax", "log_softmax", "logsumexp"),
    *("layer_norm", "rms_norm", "cumsum", "argmax", "decode", "prefill"),
)
"""The other ops are forms of these, with the same kernel."""


def _linear(n: int, k: int) -> Case:
    return products(n, k)[0]


def checked_cases(device_type: str) -> tuple[Case, ...]:
    """Every op once; on a GPU, products and rows also at the shapes that take other paths."""
    if device_type == "cuda":
        return (
            *products(6144, 4096),
            *starmap(_linear, ((4096, 12288), (1280, 8192), (8192, 1024), (256, 4104))),
            *row_ops(4096),
            *row_ops(151936, max_rows=129),
            *attention(32, 8, 128, context=1024, prefill=256, max_rows=(129, 17)),
        )  # fmt: skip
    return (
        *products(256, 512),
        _linear(77, 254),
        *row_ops(4096),
        *attention(2, 1, 64, context=300, prefill=140, max_rows=(33, 9)),
    )


def timed_cases(device_type: str) -> tuple[Case, ...]:
    """The ops that cost time, at shapes of an 8B on a GPU and of a small model on a CPU."""
    if device_type == "cuda":
        found = (
            *products(6144, 4096),
            *starmap(_linear, ((4096, 4096), (24576, 4096), (4096, 12288))),
            *row_ops(4096),
            *(c for c in row_ops(151936, 1024) if c.op in ("softmax", "log_softmax", "argmax")),
            *attention(32, 8, 128, context=4096, prefill=2048, max_rows=(256, 16)),
        )
    else:
        found = (
            *products(1024, 1024),
            *row_ops(1024),
            *attention(4, 2, 64, context=512, prefill=256),
        )
    return tuple(case for case in found if case.op in TIMED)
