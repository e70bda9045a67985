"""Attention: q [M, H, Q, D], k and v [M, H_kv, KV, D], spans [M, 1, 2] -> [M, H, Q, D]."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ndcheck_kernels.measure.cases.case import (
    Call,
    Case,
    Draw,
    Ends,
    Form,
    Operands,
    Source,
    sum_in_groups,
)
from ndcheck_kernels.measure.reference import attention_reference
from ndcheck_kernels.ops.attention import attention_op, causal_spans
from ndcheck_kernels.scope.state import active_scope


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


SOFTCAP, SCALE = 2.0, 2**-5  # exact, as the largest scores shall be


def _softcapped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor
) -> torch.Tensor:
    return _eager_or_op(q, k, v, spans, SOFTCAP, None)


def _with_sinks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor
) -> torch.Tensor:
    return _eager_or_op(q, k, v, spans, 0.0, _sinks(q))


def _sinks(q: torch.Tensor) -> torch.Tensor:
    return torch.arange(q.shape[1], device=q.device).to(q.dtype)


def _eager_or_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor,
    softcap: float, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """torch has no op for these: outside the scope, what transformers' eager attention does."""
    scale = q.shape[-1] ** -0.5
    if active_scope() is not None:
        result: torch.Tensor = attention_op(q, k, v, spans, scale, softcap, sinks=sinks)
        return result
    keys, values = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ keys.mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_visible(q, k), -torch.inf)
    if sinks is not None:
        sink = sinks[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
    return weights @ values


def _visible(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(
        k.shape[2] - q.shape[2]
    )


def _masked(mask_dtype: torch.dtype) -> Call:
    """torch's own op with the mask spelt out."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        mask = _visible(q, k)
        if mask_dtype != torch.bool:
            lowest = torch.finfo(q.dtype).min
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, lowest)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    return call


def _sdpa_scaled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor
) -> torch.Tensor:
    causal = q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=SCALE, enable_gqa=True)


def _reference_with(scale: float | None = None, softcap: float = 0.0, sinks: bool = False) -> Call:
    def reference(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor
    ) -> torch.Tensor:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return attention_reference(q, k, v, spans, factor, softcap, _sinks(q) if sinks else None)

    return reference


_FORMS = {
    "attention": (
        Form("with softcap", _softcapped, _reference_with(softcap=SOFTCAP)),
        Form("with sinks", _with_sinks, _reference_with(sinks=True)),
    ),
    "scaled_dot_product_attention": (
        Form("with scale", _sdpa_scaled, _reference_with(scale=SCALE)),
        Form("with a mask", _masked(torch.bool), _attention_reference),
        Form("with a mask of numbers", _masked(torch.float32), _attention_reference),
    ),
}


def _attention_ends(draw: Draw, keys: int) -> Ends:
    """Values at both ends of the range; and scores so far apart that each row has one share, to
    keys of one score. They are exact: any error in them would choose other keys.
    """

    def ends(source: Source, m: int) -> Iterator[tuple[str, Operands]]:
        q, k, v, spans = draw(source, m, False).rows
        limits, wide = torch.finfo(source.dtype), torch.finfo(torch.float32)
        largest = v.abs().max().item()
        top = min(limits.max, wide.max / (64 * keys)) / largest
        bottom = max(limits.tiny, 2**24 * wide.tiny) / largest
        for name, factor in (("the largest", top), ("the smallest", bottom)):
            values = (v.double() * factor).to(v.dtype)
            yield f"{name} values", Operands((q, k, values, spans))
        q, k = (source.integers(*t.shape) * 2**10 for t in (q, k))
        yield "the largest scores", Operands((q, k, v, spans))

    return ends


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
) -> Draw:
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
                    flops_per_row=work, max_rows=rows, forms=_FORMS[fires],
                    ends=_attention_ends(operands, keys), terms=keys,
                )
            )  # fmt: skip
    return tuple(cases)
