"""The selective scan of Mamba-1 and Mamba-2 in one launch, its state in registers.

Computes: `ops.selective_scan` in fp32, y rounded once.
Reduction order: tokens in order, each adding to the state by the same instructions; the sum over a
    state by `tl.sum` over all of it in one block; then D x.
Depends on: P, N, the heads of a group, dtype, architecture, Triton version. There is one kernel for
    one token and for many, so never on how many a pass has; a program has a row of the batch.
Dtypes: bfloat16, float16, float32; A, dt and states are float32.
Not claimed: gradients; states of more than `_MOST_STATES`; tensor cores, so a long prompt at a
    large batch takes longer than in chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import follow, pdl

_TILE = 1024
_MOST_STATES = 512


# One kernel for all lengths: what Triton knows of a number or an address decides the layout, and
# with that the order within `tl.sum`.
@triton.jit(
    do_not_specialize=[
        *("T", "stride_xb", "stride_xt", "stride_bb", "stride_bt", "stride_cb", "stride_ct"),
    ],
    do_not_specialize_on_alignment=["x_ptr", "dt_ptr", "b_ptr", "c_ptr", "y_ptr"],
)
def _scan_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, state_ptr, y_ptr, T,
    stride_xb, stride_xt, stride_bb, stride_bt, stride_cb, stride_ct,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, GROUP_ROWS: tl.constexpr,
    A_BY_STATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    group = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = place < GROUP_ROWS
    row = group * GROUP_ROWS + place
    head = row // P
    n = tl.arange(0, BLOCK_N)
    mask_n = n < N
    mask = mask_r[:, None] & mask_n[None, :]
    state_ptrs = state_ptr + (batch * (HEADS * P) + row[:, None]) * N + n[None, :]
    state = tl.load(state_ptrs, mask, other=0.0)
    if A_BY_STATE:
        a = tl.load(a_ptr + head[:, None] * N + n[None, :], mask, other=0.0)
    else:
        a = tl.load(a_ptr + head, mask_r, other=0.0)[:, None]
    d = tl.load(d_ptr + head, mask_r, other=0.0).to(tl.float32)
    x_ptrs = x_ptr + batch * stride_xb + row
    b_ptrs = b_ptr + batch * stride_bb + group * N + n
    c_ptrs = c_ptr + batch * stride_cb + group * N + n
    dt_ptrs = dt_ptr + batch * T * HEADS + head
    y_ptrs = y_ptr + batch * T * (HEADS * P) + row
    x = tl.load(x_ptrs, mask_r, other=0.0)
    dt = tl.load(dt_ptrs, mask_r, other=0.0)
    b = tl.load(b_ptrs, mask_n, other=0.0)
    c = tl.load(c_ptrs, mask_n, other=0.0)
    for t in range(T):
        # The next token is on its way while this one is computed.
        more_r, more_n = mask_r & (t + 1 + 0 * place < T), mask_n & (t + 1 + 0 * n < T)
        x_ptrs += stride_xt
        b_ptrs += stride_bt
        c_ptrs += stride_ct
        dt_ptrs += HEADS
        next_x = tl.load(x_ptrs, more_r, other=0.0)
        next_dt = tl.load(dt_ptrs, more_r, other=0.0)
        next_b = tl.load(b_ptrs, more_n, other=0.0)
        next_c = tl.load(c_ptrs, more_n, other=0.0)
        wide = x.to(tl.float32)
        state = state * tl.exp(dt[:, None] * a) + (dt * wide)[:, None] * b.to(tl.float32)[None, :]
        y = tl.sum(state * c.to(tl.float32)[None, :], 1) + d * wide
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask_r)
        y_ptrs += HEADS * P
        x, dt, b, c = next_x, next_dt, next_b, next_c
    tl.store(state_ptrs, state, mask)


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    state: torch.Tensor,
) -> torch.Tensor:
    """Shapes as in `ops.selective_scan`; ValueError or TypeError for what it does not take."""
    device.require_float("selective_scan", x, B, C, D)
    batch, length, heads, features = x.shape
    groups, states = B.shape[2:]
    if any(t.dtype != torch.float32 for t in (dt, A, state)):
        raise TypeError("selective_scan takes float32 time steps, decays and states")
    if states > _MOST_STATES or heads % groups:
        raise ValueError(f"no scan of {states} states, or of {heads} heads in {groups} groups")
    if not state.is_contiguous() or state.data_ptr() % 16:
        raise ValueError("a scan's state is contiguous, and its address a multiple of 16")
    y = torch.empty((batch, length, heads, features), dtype=x.dtype, device=x.device)
    if y.numel():
        x, B, C = (_tokens(t) for t in (x, B, C))
        rows = heads // groups * features
        block_n = triton.next_power_of_2(states)
        block_r = min(triton.next_power_of_2(rows), max(1, _TILE // block_n))
        _scan_kernel[(triton.cdiv(rows, block_r), groups, batch)](
            x, dt.contiguous(), A.contiguous(), B, C, D.contiguous(), state, y, length,
            *x.stride()[:2], *B.stride()[:2], *C.stride()[:2],
            HEADS=heads, P=features, N=states, GROUP_ROWS=rows, A_BY_STATE=A.dim() == 2,
            BLOCK_R=block_r, BLOCK_N=block_n, num_warps=4, enable_fp_fusion=True,
            **pdl(y.device),
        )  # fmt: skip
    return y


def _tokens(t: torch.Tensor) -> torch.Tensor:
    """[B, T, M, K] as [B, T, M * K] with one token's values side by side."""
    flat = t.flatten(2)
    return flat if flat.stride(2) == 1 else flat.contiguous()
