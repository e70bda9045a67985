# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: ANN001, ANN202
# (both: Triton types the arguments of jit functions)
"""Causal attention with one arithmetic for prefill, chunked prefill and decode.

Computes: softmax(q k^T * scale, capped if asked) v per query head, each query seeing the keys from
    its row's first token, or the last `window` of them, up to its own position; a sink is one more
    score without a value; fp32 accumulation, probabilities rounded to the dtype before they meet
    v, one rounding at the end. A query before its row's first token gives zeros.
Reduction order: keys are cut into splits counted from the row's own first token: SHORT of SPLIT
    tokens each, then of four times SPLIT; a split is cut into blocks of BLOCK_KV. Inside a split
    blocks are taken in ascending order with a running maximum; within a block the tensor cores add
    in ascending order and the denominator is an exact integer sum, in units of 2**-23 of the
    running maximum. Splits are merged in ascending order, after the sink. A hidden block or split
    adds exactly nothing, so it may be computed or not.
Depends on: head_dim, dtype, architecture, and the row's own tokens. Not on padding, neighbours, the
    length of the cache, how many queries come at once, or whether splits run in parallel (few
    queries) or in sequence (many).
Dtypes: bfloat16, float16, float32 (IEEE, no TF32). head_dim up to 256; v may have another.
Not claimed: gradients, dropout, other masks; a row with infinities in its own later tokens, or in
    earlier ones that a window hides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import AttentionConfig, attention_config
from ndcheck_kernels.cuda.dependent_launch import follow, pdl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scaled_up(top, scale):
    """top * scale, rounded up: below the exact product a probability could exceed 1."""
    m = top * scale
    bits = m.to(tl.int32, bitcast=True)
    above = (bits + tl.where(m < 0.0, -1, 1)).to(tl.float32, bitcast=True)
    return tl.where(tl.fma(top, scale, -m) > 0.0, above, m)


@triton.jit
def _attend(q, k, v, mask, m, den, acc, scale, cap, MASKED: tl.constexpr, CAPPED: tl.constexpr):
    """One block of keys: q [Q, D], k [KV, D], v [KV, DV], mask [Q, KV]; m, den [Q]; acc [Q, DV]."""
    scores = tl.dot(q, k.T, input_precision="ieee")  # [Q, KV]
    if CAPPED:
        # cap * tanh, whose scale then holds the factors of its exponential.
        scores = cap - 2.0 * cap / (tl.exp2(scores * scale) + 1.0)
        scale = 1.0
    if MASKED:
        scores = tl.where(mask, scores, float("-inf"))
    new_m = tl.maximum(m, _scaled_up(tl.max(scores, axis=1), scale))
    safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    p = tl.exp2(tl.fma(scores, scale, -safe_m[:, None]))
    # p is at most 1, so 1 + p has a fixed exponent, and its bits count p in units of 2**-23.
    # Integers add in any order. They wrap around; so does what the ones add up to, and the
    # difference is exact.
    ones: tl.constexpr = 0x3F800000 * p.shape[1] % 2**32
    units = tl.sum((p + 1.0).to(tl.uint32, bitcast=True), axis=1) - ones
    fade = tl.exp2(m - safe_m)
    den = tl.fma(
        den, fade, units.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-07
    )  # 2**-23
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return new_m, den, acc


@triton.jit
def _merge(m, den, acc, split_m, split_den, split_acc):
    """Add a split to the total of those before it."""
    new_m = tl.maximum(m, split_m)
    safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    fade = tl.exp2(m - safe_m)
    split_fade = tl.exp2(split_m - safe_m)
    den = tl.fma(den, fade, split_den * split_fade)
    acc = acc * fade[:, None] + split_acc * split_fade[:, None]
    return new_m, den, acc


@triton.jit
def _row(
    starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr
):
    """The row's own tokens: [start, end) of the keys."""
    start = 0
    end = kv_length
    if HAS_STARTS:
        start = tl.load(starts_ptr + batch)
    if HAS_LENGTHS:
        end = tl.load(lengths_ptr + batch)
    return start, end


@triton.jit
def _load_kv(
    ptr, first, end, stride, BLOCK_KV: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """[BLOCK_KV, D], of which DIM columns are there."""
    offs = first + tl.arange(0, BLOCK_KV)
    offs_d = tl.arange(0, D)
    ptrs = ptr + offs.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if MASKED:
        # A sliding cache has dropped the tokens before column 0.
        own = (offs >= 0) & (offs < end)
        return tl.load(ptrs, own[:, None] & (offs_d < DIM)[None, :], other=0.0)
    elif DIM != D:  # noqa: RET505 - the jit compiler needs all branches
        return tl.load(ptrs, (offs_d < DIM)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _split_start(split, SPLIT: tl.constexpr, SHORT: tl.constexpr):
    """Where a split starts, in tokens from the row's first: SHORT of SPLIT, then four times it."""
    return split * SPLIT + tl.maximum(split - SHORT, 0) * (3 * SPLIT)


@triton.jit
def _split_count(tokens, SPLIT: tl.constexpr, SHORT: tl.constexpr):
    long = tl.cdiv(tl.maximum(tokens - SHORT * SPLIT, 0), 4 * SPLIT)
    return tl.cdiv(tl.minimum(tokens, SHORT * SPLIT), SPLIT) + long


@triton.jit
def _split_of(token, SPLIT: tl.constexpr, SHORT: tl.constexpr):
    """The split that holds a token, counted from the row's first."""
    long = tl.maximum(token - SHORT * SPLIT, 0) // (4 * SPLIT)
    return tl.minimum(token // SPLIT, SHORT) + long


@triton.jit
def _start_total(sinks_ptr, head, ROWS: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Running maximum and denominator before the first split: the sink's, or nothing's."""
    m = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    den = tl.zeros((ROWS,), dtype=tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2_E
        m = tl.full((ROWS,), 0.0, dtype=tl.float32) + sink
        den += 1.0
    return m, den


@triton.jit
def _attend_range(
    q, k_ptr, v_ptr, first, last, end, positions, m, den, acc, scale, cap, window, stride_kn,
    stride_vn, BLOCK_KV: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr,
    DV: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The blocks of keys from `first` to `last`; MASKED where a query might not see them all."""
    for n in range(first, last, BLOCK_KV):
        k = _load_kv(k_ptr, n, end, stride_kn, BLOCK_KV, DIM, D, MASKED)
        v = _load_kv(v_ptr, n, end, stride_vn, BLOCK_KV, DIM_V, DV, MASKED)
        columns = n + tl.arange(0, BLOCK_KV)[None, :]
        mask = columns <= positions[:, None]
        if WINDOWED:
            mask &= columns > positions[:, None] - window
        m, den, acc = _attend(q, k, v, mask, m, den, acc, scale, cap, MASKED, CAPPED)
    return m, den, acc


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, starts_ptr, lengths_ptr, sinks_ptr, scale, cap, window, q_length,
    kv_length, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SINKS: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr, SPLIT: tl.constexpr, SHORT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Splits in sequence: one program per block of queries of one head."""
    follow(PDL)
    head = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    # The last queries see most keys, so they start first.
    offs_q = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, D)
    offs_v = tl.arange(0, DV)
    start, end = _row(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
    positions = end - q_length + offs_q
    mask_q = offs_q < q_length
    q_ptrs = q_ptr + batch * stride_qb + head * stride_qh
    q_ptrs += offs_q.to(tl.int64)[:, None] * stride_qm + offs_d[None, :]
    q = tl.load(q_ptrs, mask_q[:, None] & (offs_d < DIM)[None, :], other=0.0)  # [BLOCK_Q, D]
    k_ptr += batch * stride_kb + (head // GROUP) * stride_kh
    v_ptr += batch * stride_vb + (head // GROUP) * stride_vh
    tot_m, tot_den = _start_total(sinks_ptr, head, BLOCK_Q, HAS_SINKS)
    tot = tl.zeros((BLOCK_Q, DV), dtype=tl.float32)
    stop = tl.minimum(end, tl.max(positions, axis=0) + 1)
    seen_by_all = tl.minimum(tl.min(positions, axis=0) + 1, stop)
    seen = start  # by any query here
    if WINDOWED:
        seen = tl.maximum(start, tl.min(positions, axis=0) - window + 1)
        seen_by_all = start  # window's edge: every block is masked
    first_split = _split_of(seen - start, SPLIT, SHORT) if WINDOWED else 0
    for split in range(first_split, _split_count(stop - start, SPLIT, SHORT)):
        first = start + _split_start(split, SPLIT, SHORT)
        last = tl.minimum(start + _split_start(split + 1, SPLIT, SHORT), stop)
        if WINDOWED:
            first += tl.maximum(seen - first, 0) // BLOCK_KV * BLOCK_KV
        clear = tl.minimum(tl.maximum(seen_by_all, first), last) - first
        clear = first + clear // BLOCK_KV * BLOCK_KV
        m = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
        den = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_Q, DV), dtype=tl.float32)
        m, den, acc = _attend_range(
            q, k_ptr, v_ptr, first, clear, end, positions, m, den, acc, scale, cap, window,
            stride_kn, stride_vn, BLOCK_KV, DIM, D, DIM_V, DV, False, CAPPED, False,
        )  # fmt: skip
        m, den, acc = _attend_range(
            q, k_ptr, v_ptr, clear, last, end, positions, m, den, acc, scale, cap, window,
            stride_kn, stride_vn, BLOCK_KV, DIM, D, DIM_V, DV, True, CAPPED, WINDOWED,
        )  # fmt: skip
        tot_m, tot_den, tot = _merge(tot_m, tot_den, tot, m, den, acc)
    o = tot / tl.where(tot_den == 0.0, 1.0, tot_den)[:, None]
    o_ptrs = o_ptr + batch * stride_ob + head * stride_oh
    o_ptrs += offs_q.to(tl.int64)[:, None] * stride_om + offs_v[None, :]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask_q[:, None] & (offs_v < DIM_V)[None, :])


@triton.jit
def _first_split(
    start, end, q_length, window, SPLIT: tl.constexpr, SHORT: tl.constexpr, WINDOWED: tl.constexpr
):
    """The first split that any of the last `q_length` queries sees something of."""
    first = 0
    if WINDOWED:
        first = _split_of(tl.maximum(end - q_length - window + 1 - start, 0), SPLIT, SHORT)
    return first


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, m_ptr, den_ptr, acc_ptr, o_ptr, starts_ptr, lengths_ptr, sinks_ptr,
    scale, cap, window, q_length, kv_length, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    WHOLE: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_SINKS: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_KV: tl.constexpr, SPLIT: tl.constexpr, SHORT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Splits in parallel: one program per split, with all queries of one key head in its rows.

    WHOLE where the cache has room for one split only: it is merged with the sink here, and without
    one merging would change no bit.
    """
    follow(PDL)
    place, kv_head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    start, end = _row(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
    split = place + _first_split(start, end, q_length, window, SPLIT, SHORT, WINDOWED)
    first = start + _split_start(split, SPLIT, SHORT)
    last = tl.minimum(start + _split_start(split + 1, SPLIT, SHORT), end)
    if (first < end) | WHOLE:
        if WINDOWED:
            hidden = tl.maximum(end - q_length - window + 1 - first, 0)
            first += hidden // BLOCK_KV * BLOCK_KV
        rows = tl.arange(0, ROWS)
        offs_d = tl.arange(0, D)
        offs_v = tl.arange(0, DV)
        mask_q = rows < GROUP * q_length
        positions = end - q_length + rows % q_length
        head = kv_head * GROUP + rows // q_length
        q_ptrs = q_ptr + batch * stride_qb + head[:, None] * stride_qh
        q_ptrs += (rows % q_length)[:, None] * stride_qm + offs_d[None, :]
        q = tl.load(q_ptrs, mask_q[:, None] & (offs_d < DIM)[None, :], other=0.0)  # [ROWS, D]
        k_ptr += batch * stride_kb + kv_head * stride_kh
        v_ptr += batch * stride_vb + kv_head * stride_vh
        m, den, acc = _attend_range(
            q, k_ptr, v_ptr, first, last, end, positions,
            tl.full((ROWS,), float("-inf"), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32),
            tl.zeros((ROWS, DV), dtype=tl.float32), scale, cap, window, stride_kn, stride_vn,
            BLOCK_KV, DIM, D, DIM_V, DV, True, CAPPED, WINDOWED,
        )  # fmt: skip
        if WHOLE:
            if HAS_SINKS:
                sink_m, sink_den = _start_total(sinks_ptr, tl.where(mask_q, head, 0), ROWS, True)
                m, den, acc = _merge(sink_m, sink_den, tl.zeros_like(acc), m, den, acc)
            o = acc / tl.where(den == 0.0, 1.0, den)[:, None]
            o_ptrs = o_ptr + batch * stride_ob + head[:, None] * stride_oh
            o_ptrs += (rows % q_length)[:, None] * stride_om + offs_v[None, :]
            mask_o = mask_q[:, None] & (offs_v < DIM_V)[None, :]
            tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask_o)
        else:
            part = (batch * tl.num_programs(1) + kv_head) * tl.num_programs(0) + place
            offs = part * GROUP * q_length + rows
            tl.store(m_ptr + offs, m, mask_q)
            tl.store(den_ptr + offs, den, mask_q)
            tl.store(acc_ptr + offs[:, None] * DV + offs_v[None, :], acc, mask_q[:, None])


@triton.jit
def _merge_kernel(
    m_ptr, den_ptr, acc_ptr, o_ptr, starts_ptr, lengths_ptr, sinks_ptr, window, q_length,
    kv_length, splits, stride_ob, stride_oh, stride_om,
    HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SINKS: tl.constexpr,
    WINDOWED: tl.constexpr, GROUP: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
    SPLIT: tl.constexpr, SHORT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The splits that `_decode_kernel` left, merged for one query of one head."""
    follow(PDL)
    row, kv_head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    head = kv_head * GROUP + row // q_length
    start, end = _row(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
    one = tl.arange(0, 1)
    offs_v = tl.arange(0, DV)[None, :]
    tot_m, tot_den = _start_total(sinks_ptr, head, 1, HAS_SINKS)
    tot = tl.zeros((1, DV), dtype=tl.float32)
    part = (batch * tl.num_programs(1) + kv_head) * splits * GROUP * q_length + row
    first = _first_split(start, end, q_length, window, SPLIT, SHORT, WINDOWED)
    count = _split_count(end - start, SPLIT, SHORT) - first
    for place in tl.range(count, loop_unroll_factor=8):
        offs = part + place * GROUP * q_length + one
        m, den = tl.load(m_ptr + offs), tl.load(den_ptr + offs)
        acc = tl.load(acc_ptr + offs[:, None] * DV + offs_v)
        tot_m, tot_den, tot = _merge(tot_m, tot_den, tot, m, den, acc)
    o = tot / tl.where(tot_den == 0.0, 1.0, tot_den)[:, None]
    o_ptr += batch * stride_ob + head * stride_oh
    o_ptrs = o_ptr + (row % q_length) * stride_om + one[:, None] + offs_v
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), offs_v < DIM_V)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
    starts: torch.Tensor | None = None, lengths: torch.Tensor | None = None,
    scale: float | None = None, window: int | None = None, softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of q [B, H, L, D] over k [B, KV heads, T, D] and v [B, KV heads, T, DV].

    Row b's own tokens are keys starts[b] to lengths[b] (0 and T by default; left padding lies
    before, unused cache behind) and its L queries are the last of them. Each sees the last `window`
    keys up to its own; a sliding cache that has dropped earlier ones has a negative start. Scores
    s become softcap * tanh(s / softcap). `sinks` [H] are scores without a value. The result is
    [B, H, L, DV], a view of [B, L, H, DV].
    """
    config = attention_config(q.shape[-1], q.element_size(), device.capability(q.device))
    rows = q.shape[1] // max(k.shape[1], 1) * q.shape[2]
    kind = Kind(scale, window, softcap, sinks)
    return _launch(q, k, v, starts, lengths, kind, config, parallel=rows <= config.max_rows)


@cache
def _has_hopper_kernel(where: torch.device) -> bool:
    """Gluon's warp specialisation is what the kernel expects from Triton 3.6 on."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return device.on_gpu(where) and device.capability(where) == 90 and version >= (3, 6)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a model's attention does to the scores."""

    scale: float | None = None
    window: int | None = None
    softcap: float = 0.0
    sinks: torch.Tensor | None = None


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor | None,
    lengths: torch.Tensor | None, kind: Kind, config: AttentionConfig, *, parallel: bool,
) -> torch.Tensor:  # fmt: skip
    device.require_float("attention", q, k, v)
    batch, heads, q_length, dim = q.shape
    kv_heads, kv_length, dim_v = v.shape[1:]
    if k.shape != (batch, kv_heads, kv_length, dim) or len(v) != batch or heads % kv_heads:
        shapes = f"{tuple(q.shape)} over {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"attention of {shapes}")
    if not 1 <= max(dim, dim_v) <= 256:
        raise ValueError(f"attention has no head_dim {max(dim, dim_v)}, only up to 256")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention of {q.dtype} over {k.dtype}, {v.dtype}")
    o = torch.empty((batch, q_length, heads, dim_v), dtype=q.dtype, device=q.device).transpose(1, 2)
    if o.numel() == 0:
        return o
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    group = heads // kv_heads
    scale = dim**-0.5 if kind.scale is None else kind.scale
    # tanh(x) is 1 - 2 / (exp(2 x) + 1).
    scale *= 2 * _LOG2_E.value / kind.softcap if kind.softcap else _LOG2_E.value
    cap, window = kind.softcap * _LOG2_E.value, kind.window or 0
    limits = [None if t is None else t.to(torch.int32).contiguous() for t in (starts, lengths)]
    # A pointer that is not read stands in for what is not given.
    given = [q if t is None else t for t in limits]
    sinks = q if kind.sinks is None else kind.sinks.contiguous()
    block_v = max(16, triton.next_power_of_2(dim_v))
    shared = {
        "HAS_STARTS": starts is not None, "HAS_LENGTHS": lengths is not None,
        "HAS_SINKS": kind.sinks is not None, "WINDOWED": window > 0, "GROUP": group,
        "DIM_V": dim_v, "DV": block_v, "SPLIT": config.split, "SHORT": config.short_splits,
        "enable_fp_fusion": False, **pdl(q.device),
    }  # fmt: skip
    scores = {"CAPPED": kind.softcap > 0, "DIM": dim, "D": max(16, triton.next_power_of_2(dim))}
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    if not parallel:
        if not window and not kind.softcap and _has_hopper_kernel(q.device):
            from ndcheck_kernels.cuda.attention.prefill_hopper import can_prefill, prefill

            if can_prefill(q, k, v):
                prefill(q, k, v, o, limits[0], limits[1], kind.sinks, scale, config)
                return o
        tile = config.prefill(q_length)
        _prefill_kernel[(heads, triton.cdiv(q_length, tile.block_q), batch)](
            q, k, v, o, *given, sinks, scale, cap, window, q_length, kv_length, *strides,
            *o.stride()[:3], BLOCK_Q=tile.block_q, BLOCK_KV=config.block_kv,
            num_warps=tile.warps, num_stages=tile.stages, **scores, **shared,
        )  # fmt: skip
        return o
    splits = config.splits(kv_length)
    if window:
        # Where tokens were dropped, the first split that is seen may begin before column 0.
        splits = min(splits + 1, (window + q_length - 2) // config.split + 2)
    m = den = acc = o  # stand in where nothing is left in parts
    if splits > 1:
        m, den = torch.empty((2, batch, kv_heads, splits, group * q_length), device=q.device)
        acc = torch.empty((*m.shape, block_v), device=q.device)
    _decode_kernel[(splits, kv_heads, batch)](
        q, k, v, m, den, acc, o, *given, sinks, scale, cap, window, q_length, kv_length,
        *strides, *o.stride()[:3], WHOLE=splits == 1,
        ROWS=max(16, triton.next_power_of_2(group * q_length)), BLOCK_KV=config.block_kv,
        num_warps=config.decode_warps, num_stages=config.decode_stages, **scores, **shared,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(group * q_length, kv_heads, batch)](
            m, den, acc, o, *given, sinks, window, q_length, kv_length, splits, *o.stride()[:3],
            num_warps=1, **shared,
        )  # fmt: skip
    return o
