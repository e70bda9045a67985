# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: ANN001, ANN202
# (both: Triton types the arguments of jit functions)
"""The next token: greedy, or drawn with noise that belongs to the request.

Computes: greedy: argmax of the logits. gumbel: argmax of logits / temperature + g, a draw from
    softmax(logits / temperature), where g = -log(-log(u)) and u is Philox of (seed, position,
    token id). Ties go to the lowest token id.
Reduction order: none; comparisons are exact.
Depends on: the row's logits, and for gumbel its seed, position and temperature. Never on the row's
    place in the batch, so a request draws the same tokens in any company.
Dtypes: logits bfloat16, float16, float32.
Not claimed: the random stream of torch.multinomial; top-k and top-p, which are masks to -inf on
    the logits before this.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.cuda.rows.reductions import argmax, index_of_key, ordered_key


@triton.jit(do_not_specialize=["M"])
def _gumbel_kernel(
    logits_ptr, seed_ptr, position_ptr, temperature_ptr, key_ptr, M, N, stride_m,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_n < N
    logits = tl.load(logits_ptr + row * stride_m + offs_n, mask, other=float("-inf"))
    seed = tl.load(seed_ptr + row)
    position = (offs_n * 0 + tl.load(position_ptr + row)).to(tl.uint32)
    zero = (offs_n * 0).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, offs_n.to(tl.uint32), position, zero, zero)
    u = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23
    noisy = logits.to(tl.float32) / tl.load(temperature_ptr + row) - tl.log(-tl.log(u))
    key = tl.max(ordered_key(tl.where(mask, noisy, float("-inf")), offs_n), axis=0)
    tl.store(key_ptr + row * tl.num_programs(1) + tl.program_id(1), key)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Token ids [B] for logits [B, V]."""
    return argmax(logits, dim=-1)


def gumbel(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor,
    temperatures: torch.Tensor | float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Token ids [B]: row i is the draw number positions[i] of the request seeded seeds[i]."""
    device.require_float("gumbel", logits)
    rows = device.aligned_rows(logits)
    m, n = rows.shape

    def per_row(value: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(value, dtype=dtype, device=rows.device).expand(m).contiguous()

    block = min(triton.next_power_of_2(n), 4096)
    keys = torch.empty((m, triton.cdiv(n, block)), dtype=torch.int64, device=rows.device)
    if m:
        _gumbel_kernel[keys.shape](
            rows, per_row(seeds, torch.int64), per_row(positions, torch.int64),
            per_row(temperatures, torch.float32), keys, m, n, rows.stride(0), BLOCK=block,
            num_warps=4, enable_fp_fusion=True, **pdl(rows.device),
        )  # fmt: skip
    return index_of_key(keys)
