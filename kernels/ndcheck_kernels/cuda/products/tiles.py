"""One tile of a product: its accumulator, one step of K, and where its elements lie.

With SWAP the weights are the first operand, and the accumulator is transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def accumulate(x, w, acc, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.dot(w, x.T, acc, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    else:
        acc = tl.dot(x, w.T, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    return acc


@triton.jit
def zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        return tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:  # noqa: RET505 - the jit compiler needs both branches
        return tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)


@triton.jit
def offsets(first_m, first_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    """Row and column of each accumulator element, shaped to broadcast against it."""
    offs_m = tl.cast(first_m, tl.int64) + tl.arange(0, BLOCK_M)
    offs_n = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    if SWAP:
        return offs_m[None, :], offs_n[:, None]
    else:  # noqa: RET505
        return offs_m[:, None], offs_n[None, :]


@triton.jit
def sum_groups(acc, ptrs, size, mask, group, counter_ptr, GROUPS: tl.constexpr):
    """Leave this K-group's part at ptrs, groups being `size` apart; and whether it was the last.

    Whoever comes last adds them all, in ascending order.
    """
    tl.store(ptrs + group * size, acc, mask)
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == GROUPS - 1
    if last:
        # As many at once as registers hold. Those beyond the last add 0, which changes no bit.
        MOST: tl.constexpr = 12288 // acc.numel if acc.numel < 12288 else 1
        ROUNDS: tl.constexpr = (GROUPS + MOST - 1) // MOST
        AT_ONCE: tl.constexpr = (GROUPS + ROUNDS - 1) // ROUNDS
        acc = tl.zeros_like(acc)
        for first in range(0, GROUPS, AT_ONCE):
            for g in tl.static_range(AT_ONCE):
                own = mask & (first + g < GROUPS)
                part = tl.load(ptrs + (first + g) * size, own, other=0.0, cache_modifier=".cg")
                acc = acc + part
        tl.store(counter_ptr, 0)
    return acc, last
