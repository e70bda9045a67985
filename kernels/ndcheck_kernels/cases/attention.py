"""Attention: q [M, H, Q, D], k and v [M, H_kv, KV, D], spans [M, 1, 2] -> [M, H, Q, D]."""

import torch
import torch.nn.functional as F

from ndcheck_kernels.attention_interface import attention_op, causal_spans
from ndcheck_kernels.cases.case import Case, Draw, Operands, Source, sum_in_groups
from ndcheck_kernels.mode import active_scope
from ndcheck_kernels.reference import attention_reference


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
                    flops_per_row=work, max_rows=rows,
                )
            )  # fmt: skip
    return tuple(cases)
