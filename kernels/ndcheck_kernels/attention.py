# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: ANN001, ANN202
# (both: Triton types the arguments of jit functions)
"""Causal attention with one arithmetic for prefill, chunked prefill and decode.

Computes: softmax(q k^T * scale) v per query head, each query seeing the keys from its row's first
    token up to its own position; fp32 accumulation, probabilities rounded to the dtype before
    they meet v, one rounding at the end. A query before its row's first token gives zeros.
Reduction order: keys are cut into splits counted from the row's own first token: SHORT of SPLIT
    tokens each, then of four times SPLIT; a split is cut into blocks of BLOCK_KV. Inside a split
    blocks are taken in ascending order with a running maximum; within a block the tensor cores add
    in ascending order and the denominator is an exact integer sum, in units of 2**-23 of the
    running maximum. Splits are merged in ascending order.
Depends on: head_dim, dtype, architecture, and the row's own tokens. Not on padding, neighbours, the
    length of the cache, how many queries come at once, or whether splits run in parallel (few
    queries) or in sequence (many).
Dtypes: bfloat16, float16, float32 (IEEE, no TF32). head_dim a power of two, 16 to 256.
Not claimed: gradients, dropout, sliding windows, other masks; a row with infinities in its own
    later tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels import device
from ndcheck_kernels.configs import AttentionConfig, attention_config
from ndcheck_kernels.launch import follow, pdl

_LOG2_E = 1.4426950408889634


@triton.jit
def _attend(q, k, v, mask, m, den, acc, scale, MASKED: tl.constexpr):
    """One block of keys: q [Q, D], k [KV, D], v [KV, D], mask [Q, KV]; m, den [Q]; acc [Q, D]."""
    scores = tl.dot(q, k.T, input_precision="ieee")  # [Q, KV]
    if MASKED:
        scores = tl.where(mask, scores, float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, axis=1) * scale)
    safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    p = tl.exp2(tl.fma(scores, scale, -safe_m[:, None]))
    # 1 + p has a fixed exponent, so its bits count p in units of 2**-23, and integers add in any
    # order. They wrap around; so does what the ones add up to, and the difference is exact.
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
    ptr, first, end, stride, BLOCK_KV: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr
):
    offs = first + tl.arange(0, BLOCK_KV)
    ptrs = ptr + offs.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(ptrs, (offs < end)[:, None], other=0.0)
    else:  # noqa: RET505 - the jit compiler needs both branches
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
def _attend_range(
    q, k_ptr, v_ptr, first, last, end, positions, m, den, acc, scale, stride_kn, stride_vn,
    BLOCK_KV: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The blocks of keys from `first` to `last`; MASKED where a query might not see them all."""
    for n in range(first, last, BLOCK_KV):
        k = _load_kv(k_ptr, n, end, stride_kn, BLOCK_KV, D, MASKED)
        v = _load_kv(v_ptr, n, end, stride_vn, BLOCK_KV, D, MASKED)
        mask = n + tl.arange(0, BLOCK_KV)[None, :] <= positions[:, None]
        m, den, acc = _attend(q, k, v, mask, m, den, acc, scale, MASKED)
    return m, den, acc


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, starts_ptr, lengths_ptr, scale, q_length, kv_length,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, SPLIT: tl.constexpr, SHORT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Splits in sequence: one program per block of queries of one head."""
    follow(PDL)
    head = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    # The last queries see most keys, so they start first.
    offs_q = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, D)
    start, end = _row(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
    positions = end - q_length + offs_q
    mask_q = offs_q < q_length
    q_ptrs = q_ptr + batch * stride_qb + head * stride_qh
    q_ptrs += offs_q.to(tl.int64)[:, None] * stride_qm + offs_d[None, :]
    q = tl.load(q_ptrs, mask_q[:, None], other=0.0)  # [BLOCK_Q, D]
    k_ptr += batch * stride_kb + (head // GROUP) * stride_kh
    v_ptr += batch * stride_vb + (head // GROUP) * stride_vh
    tot_m = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    tot_den = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    tot = tl.zeros((BLOCK_Q, D), dtype=tl.float32)
    stop = tl.minimum(end, tl.max(positions, axis=0) + 1)
    seen_by_all = tl.minimum(tl.min(positions, axis=0) + 1, stop)
    for split in range(_split_count(stop - start, SPLIT, SHORT)):
        first = start + _split_start(split, SPLIT, SHORT)
        last = tl.minimum(start + _split_start(split + 1, SPLIT, SHORT), stop)
        clear = tl.minimum(tl.maximum(seen_by_all, first), last) - first
        clear = first + clear // BLOCK_KV * BLOCK_KV
        m = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
        den = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_Q, D), dtype=tl.float32)
        m, den, acc = _attend_range(
            q, k_ptr, v_ptr, first, clear, end, positions, m, den, acc, scale, stride_kn,
            stride_vn, BLOCK_KV, D, False,
        )  # fmt: skip
        m, den, acc = _attend_range(
            q, k_ptr, v_ptr, clear, last, end, positions, m, den, acc, scale, stride_kn,
            stride_vn, BLOCK_KV, D, True,
        )  # fmt: skip
        tot_m, tot_den, tot = _merge(tot_m, tot_den, tot, m, den, acc)
    o = tot / tl.where(tot_den == 0.0, 1.0, tot_den)[:, None]
    o_ptrs = o_ptr + batch * stride_ob + head * stride_oh
    o_ptrs += offs_q.to(tl.int64)[:, None] * stride_om + offs_d[None, :]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask_q[:, None])


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, m_ptr, den_ptr, acc_ptr, o_ptr, starts_ptr, lengths_ptr, scale, q_length,
    kv_length, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    WHOLE: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_KV: tl.constexpr,
    SPLIT: tl.constexpr, SHORT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Splits in parallel: one program per split, with all queries of one key head in its rows.

    WHOLE where the cache has room for one split only: merging it would change no bit.
    """
    follow(PDL)
    split, kv_head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    start, end = _row(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
    first = start + _split_start(split, SPLIT, SHORT)
    last = tl.minimum(start + _split_start(split + 1, SPLIT, SHORT), end)
    if (first < end) | WHOLE:
        rows = tl.arange(0, ROWS)
        offs_d = tl.arange(0, D)
        mask_q = rows < GROUP * q_length
        positions = end - q_length + rows % q_length
        head = kv_head * GROUP + rows // q_length
        q_ptrs = q_ptr + batch * stride_qb + head[:, None] * stride_qh
        q_ptrs += (rows % q_length)[:, None] * stride_qm + offs_d[None, :]
        q = tl.load(q_ptrs, mask_q[:, None], other=0.0)  # [ROWS, D]
        k_ptr += batch * stride_kb + kv_head * stride_kh
        v_ptr += batch * stride_vb + kv_head * stride_vh
        m, den, acc = _attend_range(
            q, k_ptr, v_ptr, first, last, end, positions,
            tl.full((ROWS,), float("-inf"), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32),
            tl.zeros((ROWS, D), dtype=tl.float32), scale, stride_kn, stride_vn, BLOCK_KV, D, True,
        )  # fmt: skip
        if WHOLE:
            o = acc / tl.where(den == 0.0, 1.0, den)[:, None]
            o_ptrs = o_ptr + batch * stride_ob + head[:, None] * stride_oh
            o_ptrs += (rows % q_length)[:, None] * stride_om + offs_d[None, :]
            tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask_q[:, None])
        else:
            part = (batch * tl.num_programs(1) + kv_head) * tl.num_programs(0) + split
            offs = part * GROUP * q_length + rows
            tl.store(m_ptr + offs, m, mask_q)
            tl.store(den_ptr + offs, den, mask_q)
            tl.store(acc_ptr + offs[:, None] * D + offs_d[None, :], acc, mask_q[:, None])


@triton.jit
def _merge_kernel(
    m_ptr, den_ptr, acc_ptr, o_ptr, starts_ptr, lengths_ptr, q_length, kv_length, splits,
    stride_ob, stride_oh, stride_om, HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, SHORT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The splits that `_decode_kernel` left, merged for one query of one head."""
    follow(PDL)
    row, kv_head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    start, end = _row(starts_ptr, lengths_ptr, batch, kv_length, HAS_STARTS, HAS_LENGTHS)
    one = tl.arange(0, 1)
    offs_d = tl.arange(0, D)[None, :]
    tot_m = tl.full((1,), float("-inf"), dtype=tl.float32)
    tot_den = tl.zeros((1,), dtype=tl.float32)
    tot = tl.zeros((1, D), dtype=tl.float32)
    part = (batch * tl.num_programs(1) + kv_head) * splits * GROUP * q_length + row
    for split in tl.range(_split_count(end - start, SPLIT, SHORT), loop_unroll_factor=8):
        offs = part + split * GROUP * q_length + one
        m, den = tl.load(m_ptr + offs), tl.load(den_ptr + offs)
        acc = tl.load(acc_ptr + offs[:, None] * D + offs_d)
        tot_m, tot_den, tot = _merge(tot_m, tot_den, tot, m, den, acc)
    o = tot / tl.where(tot_den == 0.0, 1.0, tot_den)[:, None]
    o_ptr += batch * stride_ob + (kv_head * GROUP + row // q_length) * stride_oh
    tl.store(
        o_ptr + (row % q_length) * stride_om + one[:, None] + offs_d, o.to(o_ptr.dtype.element_ty)
    )


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
    starts: torch.Tensor | None = None, lengths: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of q [B, H, L, D] over k, v [B, KV heads, T, D].

    Row b's own tokens are keys starts[b] to lengths[b] (0 and T by default; left padding lies
    before, unused cache behind) and its L queries are the last of them. The result is [B, H, L, D],
    a view of [B, L, H, D].
    """
    config = attention_config(q.shape[-1], q.element_size(), device.capability(q.device))
    rows = q.shape[1] // max(k.shape[1], 1) * q.shape[2]
    return _launch(q, k, v, starts, lengths, scale, config, parallel=rows <= config.max_rows)


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor | None,
    lengths: torch.Tensor | None, scale: float | None, config: AttentionConfig, *, parallel: bool,
) -> torch.Tensor:  # fmt: skip
    device.require_float("attention", q, k, v)
    batch, heads, q_length, dim = q.shape
    kv_heads, kv_length = k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != dim or heads % kv_heads:
        raise ValueError(f"attention of {tuple(q.shape)} over {tuple(k.shape)}, {tuple(v.shape)}")
    if dim not in (16, 32, 64, 128, 256):
        raise ValueError(f"attention has no head_dim {dim}, only powers of two from 16 to 256")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention of {q.dtype} over {k.dtype}, {v.dtype}")
    o = torch.empty((batch, q_length, heads, dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    if o.numel() == 0:
        return o
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    group = heads // kv_heads
    scale = (dim**-0.5 if scale is None else scale) * _LOG2_E
    limits = [q if t is None else t.to(torch.int32).contiguous() for t in (starts, lengths)]
    shared = {
        "HAS_STARTS": starts is not None, "HAS_LENGTHS": lengths is not None, "GROUP": group,
        "D": dim, "SPLIT": config.split, "SHORT": config.short_splits,
        "enable_fp_fusion": False, **pdl(q.device),
    }  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    if not parallel:
        tile = config.prefill(q_length)
        _prefill_kernel[(heads, triton.cdiv(q_length, tile.block_q), batch)](
            q, k, v, o, *limits, scale, q_length, kv_length, *strides, *o.stride()[:3],
            BLOCK_Q=tile.block_q, BLOCK_KV=config.block_kv, num_warps=tile.warps,
            num_stages=tile.stages, **shared,
        )  # fmt: skip
        return o
    splits = config.splits(kv_length)
    m = den = acc = o  # stand in where nothing is left in parts
    if splits > 1:
        m, den = torch.empty((2, batch, kv_heads, splits, group * q_length), device=q.device)
        acc = torch.empty((*m.shape, dim), device=q.device)
    _decode_kernel[(splits, kv_heads, batch)](
        q, k, v, m, den, acc, o, *limits, scale, q_length, kv_length,
        *strides, *o.stride()[:3], WHOLE=splits == 1,
        ROWS=max(16, triton.next_power_of_2(group * q_length)),
        BLOCK_KV=config.block_kv, num_warps=config.decode_warps, num_stages=config.decode_stages,
        **shared,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(group * q_length, kv_heads, batch)](
            m, den, acc, o, *limits, q_length, kv_length, splits, *o.stride()[:3], num_warps=1,
            **shared,
        )  # fmt: skip
    return o
