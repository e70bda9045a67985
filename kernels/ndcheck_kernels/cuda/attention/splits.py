"""A row's keys, cut into splits and blocks: which there are, what one adds, and how they merge."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_bounds(
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
def split_start(split, SPLIT: tl.constexpr, SHORT: tl.constexpr):
    """Where a split starts, in tokens from the row's first: SHORT of SPLIT, then four times it."""
    return split * SPLIT + tl.maximum(split - SHORT, 0) * (3 * SPLIT)


@triton.jit
def split_count(tokens, SPLIT: tl.constexpr, SHORT: tl.constexpr):
    long = tl.cdiv(tl.maximum(tokens - SHORT * SPLIT, 0), 4 * SPLIT)
    return tl.cdiv(tl.minimum(tokens, SHORT * SPLIT), SPLIT) + long


@triton.jit
def split_of(token, SPLIT: tl.constexpr, SHORT: tl.constexpr):
    """The split that holds a token, counted from the row's first."""
    long = tl.maximum(token - SHORT * SPLIT, 0) // (4 * SPLIT)
    return tl.minimum(token // SPLIT, SHORT) + long


@triton.jit
def opens_split(token, SPLIT: tl.constexpr, SHORT: tl.constexpr):
    """Is a token, counted from the row's first, the first of its split?"""
    long = token - SHORT * SPLIT
    return tl.where(long < 0, token % SPLIT, long % (4 * SPLIT)) == 0


@triton.jit
def first_seen(position, start, window, CHUNKED: tl.constexpr):
    """The first key that a query at `position` sees, by its window or by its chunk."""
    if CHUNKED:
        return start + (position - start) // window * window
    return position - window + 1


@triton.jit
def first_seen_split(
    start, end, q_length, window, SPLIT: tl.constexpr, SHORT: tl.constexpr, WINDOWED: tl.constexpr,
    CHUNKED: tl.constexpr,
):  # fmt: skip
    """The first split that any of the last `q_length` queries sees something of."""
    first = 0
    if WINDOWED:
        seen = first_seen(end - q_length, start, window, CHUNKED)
        first = split_of(tl.maximum(seen - start, 0), SPLIT, SHORT)
    return first


@triton.jit
def load_kv(
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
def scaled_up(top, scale):
    """top * scale, rounded up: below the exact product a probability could exceed 1."""
    m = top * scale
    bits = m.to(tl.int32, bitcast=True)
    above = (bits + tl.where(m < 0.0, -1, 1)).to(tl.float32, bitcast=True)
    return tl.where(tl.fma(top, scale, -m) > 0.0, above, m)


@triton.jit
def attend(
    q, k, v, mask, bias, m, den, acc, scale, cap, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """One block of keys: q [Q, D], k [KV, D], v [KV, DV]; mask [Q, KV], bias [Q or 1, KV]; m,
    den [Q]; acc [Q, DV].
    """
    scores = tl.dot(q, k.T, input_precision="ieee")  # [Q, KV]
    if CAPPED:
        # cap * tanh, whose scale then holds the factors of its exponential.
        scores = cap - 2.0 * cap / (tl.exp2(scores * scale) + 1.0)
        scale = 1.0
    if BIASED:
        scores = tl.fma(scores, scale, bias * LOG2_E)
        scale = 1.0
    if MASKED:
        scores = tl.where(mask, scores, float("-inf"))
    new_m = tl.maximum(m, scaled_up(tl.max(scores, axis=1), scale))
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
def merge(m, den, acc, split_m, split_den, split_acc):
    """Add a split to the total of those before it."""
    new_m = tl.maximum(m, split_m)
    safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    fade = tl.exp2(m - safe_m)
    split_fade = tl.exp2(split_m - safe_m)
    den = tl.fma(den, fade, split_den * split_fade)
    acc = tl.fma(acc, fade[:, None], split_acc * split_fade[:, None])
    return new_m, den, acc


@triton.jit
def start_total(sinks_ptr, head, ROWS: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Running maximum and denominator before the first split: the sink's, or nothing's."""
    m = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    den = tl.zeros((ROWS,), dtype=tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        m = tl.full((ROWS,), 0.0, dtype=tl.float32) + sink
        den += 1.0
    return m, den


@triton.jit
def attend_block(
    q, k_ptr, v_ptr, slopes, n, start, end, positions, m, den, acc, scale, cap, window, stride_kn,
    stride_vn, BLOCK_KV: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr,
    DV: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    CHUNKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The block of keys from `n` on; MASKED where a query might not see them all.

    BIAS is the dtype that slopes [Q or 1] times a key's place is rounded to, or None.
    """
    # Codes of an FP8 cache are numbers of every dtype here.
    k = load_kv(k_ptr, n, end, stride_kn, BLOCK_KV, DIM, D, MASKED).to(q.dtype)
    v = load_kv(v_ptr, n, end, stride_vn, BLOCK_KV, DIM_V, DV, MASKED).to(q.dtype)
    columns = n + tl.arange(0, BLOCK_KV)[None, :]
    mask = columns <= positions[:, None]
    if WINDOWED:
        mask &= columns >= first_seen(positions[:, None], start, window, CHUNKED)
    bias = 0.0
    if BIAS is not None:
        bias = slopes[:, None] * (columns - start).to(tl.float32)
        bias = bias.to(BIAS).to(tl.float32)
    return attend(q, k, v, mask, bias, m, den, acc, scale, cap, MASKED, CAPPED, BIAS is not None)


@triton.jit
def attend_range(
    q, k_ptr, v_ptr, slopes, first, last, start, end, positions, m, den, acc, scale, cap, window,
    stride_kn, stride_vn, BLOCK_KV: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    DIM_V: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr, CHUNKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The blocks of keys of one split, from `first` to `last`."""
    for n in range(first, last, BLOCK_KV):
        m, den, acc = attend_block(
            q, k_ptr, v_ptr, slopes, n, start, end, positions, m, den, acc, scale, cap, window,
            stride_kn, stride_vn, BLOCK_KV, DIM, D, DIM_V, DV, MASKED, CAPPED, WINDOWED, CHUNKED,
            BIAS,
        )  # fmt: skip
    return m, den, acc
