"""What a measurement reads off a row of logits, in one pass over them.

Computes: the index of the largest logit (ties: the lowest), its margin over the next largest,
    log(sum(exp(logits))) in fp32, and a digest of the row's bits: two 32-bit words, each the sum
    modulo 2**32 of a bijective mix (the finaliser of MurmurHash3, Appleby 2011) of every element's
    bits and index, so one changed bit always changes both.
Reduction order: blocks of BLOCK elements, each one `tl.sum`; their sums, scaled to the row's
    maximum, are one `tl.sum` over a tile of `next_power_of_2(blocks)`. The rest is exact.
Depends on: N, dtype, architecture, Triton version. Never on the other rows.
Dtypes: bfloat16, float16, float32.
Not claimed: equality of the logsumexp with torch's; the digest is the same on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import follow, pdl

BLOCK = 4096


class Reading(NamedTuple):
    """Per row, each [B]: int64 token ids, fp32 margins and logsumexps, int64 digests."""

    token_ids: torch.Tensor
    margins: torch.Tensor
    logsumexps: torch.Tensor
    digests: torch.Tensor


@triton.jit
def _ordered_key(x, index):
    """int64 that orders (value, then lowest index): NaN above all, -0 equal to +0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(x != x, 0x7FFFFFFF, key).to(tl.int64)
    return (key << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _mix(h):
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit(do_not_specialize=["M"])
def _read_block_kernel(
    x_ptr, key_ptr, float_ptr, word_ptr, M, N, stride_m, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    raw = tl.load(x_ptr + row * stride_m + offs, mask, other=float("-inf"))
    x = raw.to(tl.float32)
    key = tl.max(tl.where(mask, _ordered_key(x, offs), -(1 << 62)), axis=0)
    winner = 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
    top = tl.max(x, axis=0)
    second = tl.max(tl.where(offs == winner, float("-inf"), x), axis=0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(x - safe), axis=0)
    if WIDE:
        bits = raw.to(tl.uint32, bitcast=True)
    else:
        bits = raw.to(tl.uint16, bitcast=True).to(tl.uint32)
    index = offs.to(tl.uint32) * 0x9E3779B1
    part = row * blocks + block
    tl.store(key_ptr + part, key)
    tl.store(float_ptr + part, top)
    tl.store(float_ptr + M * blocks + part, second)
    tl.store(float_ptr + 2 * M * blocks + part, total)
    for lane in tl.static_range(2):
        word = tl.where(mask, _mix(bits ^ (index + lane * 0x7F4A7C15)), 0)
        tl.store(
            word_ptr + lane * M * blocks + part, tl.sum(word.to(tl.int32, bitcast=True), axis=0)
        )


# What is stored is one number a row, for which no pointer need be aligned.
@triton.jit(
    do_not_specialize=["M"],
    do_not_specialize_on_alignment=["id_ptr", "margin_ptr", "lse_ptr", "digest_ptr"],
)
def _combine_kernel(
    key_ptr, float_ptr, word_ptr, id_ptr, margin_ptr, lse_ptr, digest_ptr, M, blocks,
    PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, PADDED)
    mask = offs < blocks
    part = row * blocks + offs
    keys = tl.load(key_ptr + part, mask, other=-(1 << 62))
    tops = tl.load(float_ptr + part, mask, other=float("-inf"))
    seconds = tl.load(float_ptr + M * blocks + part, mask, other=float("-inf"))
    totals = tl.load(float_ptr + 2 * M * blocks + part, mask, other=0.0)
    key = tl.max(keys, axis=0)
    ordered = (key >> 32).to(tl.int32)
    best = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    next_best = tl.max(tl.where(keys == key, seconds, tops), axis=0)
    top = tl.max(tops, axis=0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(totals * tl.exp(tops - safe), axis=0)
    first = tl.sum(tl.load(word_ptr + part, mask, other=0), axis=0)
    second = tl.sum(tl.load(word_ptr + M * blocks + part, mask, other=0), axis=0)
    low = second.to(tl.int64) & 0xFFFFFFFF
    tl.store(id_ptr + row, 0x7FFFFFFF - (key & 0x7FFFFFFF))
    tl.store(margin_ptr + row, best - next_best)
    tl.store(lse_ptr + row, safe + tl.log(total))
    tl.store(digest_ptr + row, (first.to(tl.int64) << 32) | low)


def read_logits(logits: torch.Tensor) -> Reading:
    """Read logits [B, N]; a row that holds NaN has margin NaN."""
    device.require_float("read_logits", logits)
    rows = device.aligned_rows(logits)
    m, n = rows.shape
    where = rows.device
    ids, digests = torch.empty((2, m), dtype=torch.int64, device=where)
    margins, sums = torch.empty((2, m), dtype=torch.float32, device=where)
    if m:
        blocks = triton.cdiv(n, BLOCK)
        keys = torch.empty((m, blocks), dtype=torch.int64, device=where)
        floats = torch.empty((3, m, blocks), dtype=torch.float32, device=where)
        words = torch.empty((2, m, blocks), dtype=torch.int32, device=where)
        _read_block_kernel[(m, blocks)](
            rows, keys, floats, words, m, n, rows.stride(0), BLOCK=BLOCK,
            WIDE=rows.dtype == torch.float32, num_warps=8, enable_fp_fusion=True, **pdl(where),
        )  # fmt: skip
        _combine_kernel[(m,)](
            keys, floats, words, ids, margins, sums, digests, m, blocks,
            PADDED=triton.next_power_of_2(blocks), num_warps=1, enable_fp_fusion=True,
            **pdl(where),
        )  # fmt: skip
    return Reading(ids, margins, sums, digests)
