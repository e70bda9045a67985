"""Causal attention with one arithmetic for prefill, chunked prefill and decode.

Computes: softmax(q k^T * scale, capped if asked, plus ALiBi's slope * place) v per query head, each
    query seeing the keys from its row's first token, or from its chunk's, or the last `window` of
    them, up to its own position; a sink is one more score without a value; fp32 accumulation,
    probabilities rounded to the dtype before they meet v, one rounding at the end. A query
    before its row's first token gives zeros.
Reduction order: keys are cut into splits counted from the row's own first token: SHORT of SPLIT
    tokens each, then of four times SPLIT; a split is cut into blocks of BLOCK_KV. Inside a split
    blocks are taken in ascending order with a running maximum; within a block the tensor cores add
    in ascending order and the denominator is an exact integer sum, in units of 2**-23 of the
    running maximum. Splits are merged in ascending order, after the sink, a fused multiply-add
    each. A hidden block or split adds exactly nothing, so it may be computed or not.
Depends on: the wider head_dim, dtype, architecture, and the row's own tokens. Not on padding,
    neighbours, the length of the cache, how many queries come at once, or whether splits run in
    parallel or in sequence (many queries, or few of many rows).
Dtypes: bfloat16, float16, float32 (IEEE, no TF32); keys and values also float8_e4m3fn, which are
    widened to the queries' dtype, exactly. head_dim up to 256; v may have another.
Not claimed: gradients, dropout, other masks; a row with infinities in its own later tokens, or in
    earlier ones that a window hides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.attention.decode import _decode_kernel
from ndcheck_kernels.cuda.attention.prefill import _prefill_kernel
from ndcheck_kernels.cuda.attention.splits import LOG2_E
from ndcheck_kernels.cuda.configs import AttentionConfig, attention_config
from ndcheck_kernels.cuda.dependent_launch import pdl
from ndcheck_kernels.cuda.rows.quantise import Quantised, empty, quantise_rows
from ndcheck_kernels.ops.block_fp8 import BLOCK


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
    starts: torch.Tensor | None = None, lengths: torch.Tensor | None = None,
    scale: float | None = None, window: int | None = None, chunked: bool = False,
    softcap: float = 0.0, sinks: torch.Tensor | None = None, slopes: torch.Tensor | None = None,
    bias_dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of q [B, H, L, D] over k [B, KV heads, T, D] and v [B, KV heads, T, DV].

    Row b's own tokens are keys starts[b] to lengths[b] (0 and T by default; left padding lies
    before, unused cache behind) and its L queries are the last of them. Each sees the last `window`
    keys up to its own, or if `chunked` those of its own chunk of `window` keys; a sliding cache
    that has dropped earlier ones has a negative start. Scores s become softcap * tanh(s / softcap).
    `sinks` [H] are scores without a value; `slopes` [H] times a key's place in its row, rounded to
    `bias_dtype` if given, is added to its scores. The result is [B, H, L, DV], a view of
    [B, L, H, DV].
    """
    widest = max(q.shape[-1], v.shape[-1])
    config = attention_config(widest, q.element_size(), device.capability(q.device))
    rows = q.shape[1] // max(k.shape[1], 1) * q.shape[2]
    kind = Kind(scale, window, softcap, sinks, chunked, slopes, bias_dtype)
    return _launch(q, k, v, starts, lengths, kind, config, parallel=rows <= config.max_rows)


def quantised_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, starts: torch.Tensor,
    lengths: torch.Tensor, scale: float,
) -> Quantised:  # fmt: skip
    """What `quantise_rows` makes of `attention`'s rows [B L, H DV], few of them in its launch."""
    (batch, heads, length, dim), (kv_heads, _, dim_v) = q.shape, v.shape[1:]
    config = attention_config(max(dim, dim_v), q.element_size(), device.capability(q.device))
    if dim_v == BLOCK and heads // kv_heads * length <= config.max_rows:
        codes, scales = empty(batch * length, heads * dim_v, q.device)
        _launch(
            q, k, v, starts, lengths, Kind(scale), config, parallel=True,
            codes=codes.view(batch, length, heads, dim_v).transpose(1, 2), scales=scales,
        )  # fmt: skip
        return codes, scales
    out = attention(q, k, v, starts=starts, lengths=lengths, scale=scale)
    return quantise_rows(out.transpose(1, 2).reshape(batch * length, -1))


@dataclass(frozen=True, slots=True)
class Kind:
    """What a model's attention does to the scores."""

    scale: float | None = None
    window: int | None = None
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    chunked: bool = False
    slopes: torch.Tensor | None = None
    bias_dtype: torch.dtype | None = None


_TRITON = {
    None: tl.float32,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def can_copy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Can Hopper's copy engine read these? It wants strides and addresses in 16 bytes."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and k.dtype == q.dtype
        and q.shape[3] in (64, 128)
        and v.shape[3] in (64, 128)
        and all(
            t.data_ptr() % 16 == 0
            and all(
                s > 0 and s % 8 == 0 for s, n in zip(t.stride()[:3], t.shape, strict=False) if n > 1
            )
            for t in (q, k, v)
        )
    )


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor | None,
    lengths: torch.Tensor | None, kind: Kind, config: AttentionConfig, *, parallel: bool,
    codes: torch.Tensor | None = None, scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Into ``codes`` [B, H, L, 128], if given, and ``scales`` [B L, H], few queries only."""
    is_narrow = k.dtype == v.dtype == torch.float8_e4m3fn
    device.require_float("attention", q, *(() if is_narrow else (k, v)))
    batch, heads, q_length, dim = q.shape
    kv_heads, kv_length, dim_v = v.shape[1:]
    if k.shape != (batch, kv_heads, kv_length, dim) or len(v) != batch or heads % kv_heads:
        shapes = f"{tuple(q.shape)} over {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"attention of {shapes}")
    if not 1 <= max(dim, dim_v) <= 256:
        raise ValueError(f"attention has no head_dim {max(dim, dim_v)}, only up to 256")
    if not is_narrow and not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention of {q.dtype} over {k.dtype}, {v.dtype}")
    o = codes
    if o is None:
        o = torch.empty((batch, q_length, heads, dim_v), dtype=q.dtype, device=q.device)
        o = o.transpose(1, 2)
    if o.numel() == 0:
        return o
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    group = heads // kv_heads
    scale = dim**-0.5 if kind.scale is None else kind.scale
    # tanh(x) is 1 - 2 / (exp(2 x) + 1).
    scale *= 2 * LOG2_E.value / kind.softcap if kind.softcap else LOG2_E.value
    cap, window = kind.softcap * LOG2_E.value, kind.window or 0
    limits = [None if t is None else t.to(torch.int32).contiguous() for t in (starts, lengths)]
    # A pointer that is not read stands in for what is not given.
    given = [q if t is None else t for t in limits]
    sinks = q if kind.sinks is None else kind.sinks.contiguous()
    slopes = q if kind.slopes is None else kind.slopes.float().contiguous()
    block_v = max(16, triton.next_power_of_2(dim_v))
    shared = {
        "HAS_STARTS": starts is not None, "HAS_LENGTHS": lengths is not None,
        "HAS_SINKS": kind.sinks is not None, "WINDOWED": window > 0, "CHUNKED": kind.chunked,
        "GROUP": group, "DIM_V": dim_v, "DV": block_v, "SPLIT": config.split,
        "SHORT": config.short_splits, "enable_fp_fusion": False, **pdl(q.device),
    }  # fmt: skip
    scores = {
        "CAPPED": kind.softcap > 0, "DIM": dim, "D": max(16, triton.next_power_of_2(dim)),
        "BIAS": None if kind.slopes is None else _TRITON[kind.bias_dtype],
    }  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    is_plain = not window and not kind.softcap and kind.slopes is None
    if not parallel:
        if is_plain and device.has_hopper_kernels(q.device) and can_copy(q, k, v):
            from ndcheck_kernels.cuda.attention.prefill_hopper import prefill

            prefill(q, k, v, o, limits[0], limits[1], kind.sinks, scale, config)
            return o
        tile = config.prefill(q_length)
        _prefill_kernel[(heads, triton.cdiv(q_length, tile.block_q), batch)](
            q, k, v, o, *given, sinks, slopes, scale, cap, window, q_length, kv_length, *strides,
            *o.stride()[:3], BLOCK_Q=tile.block_q, BLOCK_KV=config.block_kv,
            num_warps=tile.warps, num_stages=tile.stages, **scores, **shared,
        )  # fmt: skip
        return o
    splits = config.splits(kv_length)
    if window:
        # Where tokens were dropped, the first split that is seen may begin before column 0.
        splits = min(splits + 1, (window + q_length - 2) // config.split + 2)
    splits = max(splits, 1)
    rows, pairs = group * q_length, batch * kv_heads
    decode, run = config.decode(rows, splits, pairs, device.sm_count(q.device))
    m = den = acc = counter = o  # stand in where nothing is left in parts
    if run < splits:
        m, den = torch.empty((2, batch, kv_heads, splits, rows), device=q.device)
        acc = torch.empty((*m.shape, block_v), device=q.device)
        counter = device.counters(pairs, q.device)
    by_hand = run < splits and decode.by_hand and rows <= 16
    by_hand = by_hand and is_plain and codes is None and dim == dim_v
    if by_hand and device.has_hopper_kernels(q.device) and can_copy(q, k, v):
        from ndcheck_kernels.cuda.attention.decode_hopper import decode as decode_by_hand

        decode_by_hand(
            q, k, v, o, (m, den, acc), counter, limits[0], limits[1], kind.sinks, scale, config
        )
        return o
    padded = triton.next_power_of_2(rows)
    # Only what is left in parts is cut to the rows in use: else one kernel serves all of them.
    block, kept = max(16, padded), padded if run < splits else max(16, padded)
    _decode_kernel[(kv_heads, batch, triton.cdiv(splits, run))](
        q, k, v, m, den, acc, counter, o, o if scales is None else scales, *given, sinks, slopes,
        scale, cap, window, q_length, kv_length, splits, run, *strides, *o.stride()[:3],
        WHOLE=run >= splits, ROWS=block, KEPT=kept, BLOCK_KV=config.block_kv,
        CODES_OF=None if codes is None else _TRITON[q.dtype], num_warps=decode.warps,
        num_stages=decode.stages, **scores, **shared,
    )  # fmt: skip
    return o
