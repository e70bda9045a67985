"""The gated delta rule, a row's tokens one after the other in one launch.

Computes: `ops.gated_delta`. With S the state before a token and d its decay, both k S and q S are
    taken in one pass over S: e = beta (v - (k d) S), S' = d S + k e, and the output
    (q d) S + (q k) e, in fp32, rounded once.
Reduction order: tokens in order; a program holds BLOCK_V columns of a head's state, whole, and a
    sum over D is one `tl.sum` over that tile. Prefill, chunks and decode are one compiled kernel,
    which only runs its loop more or less often.
Depends on: D, D_v, dtype, architecture, Triton version; the row's own tokens up to this one.
Dtypes: bfloat16, float16, float32; decay and beta may have another of them; the state is float32.
    D up to 256.
Not claimed: gradients; tensor cores at prefill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import follow, pdl

_BLOCK_V = 16
_TILE = 2048  # Elements of the state that a warp keeps in registers.
_MOST_D = 256


@triton.jit
def _load_token(
    q_ptrs, k_ptrs, v_ptrs, decay_ptrs, beta_ptr, mask_d, mask_v, BY_CHANNEL: tl.constexpr
):
    q = tl.load(q_ptrs, mask_d, other=0.0)
    k = tl.load(k_ptrs, mask_d, other=0.0)
    v = tl.load(v_ptrs, mask_v, other=0.0)
    decay = tl.load(decay_ptrs, mask_d, other=0.0) if BY_CHANNEL else tl.load(decay_ptrs)
    return q, k, v, decay, tl.load(beta_ptr)


@triton.jit(do_not_specialize=["T"])
def _gated_delta_kernel(
    q_ptr, k_ptr, v_ptr, decay_ptr, beta_ptr, state_ptr, y_ptr, T, H,
    stride_q, stride_k, stride_v, scale,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BY_CHANNEL: tl.constexpr,
    NORMALISES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_d, mask_v = offs_d < D, offs_v < D_V
    mask = mask_d[:, None] & mask_v[None, :]
    state_ptrs = state_ptr + (batch * H + head) * D * D_V + offs_d[:, None] * D_V + offs_v[None, :]
    state = tl.load(state_ptrs, mask, other=0.0)  # [BLOCK_D, BLOCK_V]
    q_ptrs = q_ptr + batch * T * stride_q + (head // GROUP) * D + offs_d
    k_ptrs = k_ptr + batch * T * stride_k + (head // GROUP) * D + offs_d
    v_ptrs = v_ptr + batch * T * stride_v + head * D_V + offs_v
    first = batch * T * H + head
    y_ptrs, beta_ptr = y_ptr + first * D_V + offs_v, beta_ptr + first
    decay_ptrs = decay_ptr + (first * D + offs_d if BY_CHANNEL else first)
    q, k, v, decay, beta = _load_token(
        q_ptrs, k_ptrs, v_ptrs, decay_ptrs, beta_ptr, mask_d, mask_v, BY_CHANNEL
    )
    for t in range(T):
        # The next token is on its way while this one is computed; after the last comes itself.
        ahead = tl.where(t + 1 < T, 1, 0)
        q_ptrs += ahead * stride_q
        k_ptrs += ahead * stride_k
        v_ptrs += ahead * stride_v
        decay_ptrs += ahead * H * D if BY_CHANNEL else ahead * H
        beta_ptr += ahead * H
        following = _load_token(
            q_ptrs, k_ptrs, v_ptrs, decay_ptrs, beta_ptr, mask_d, mask_v, BY_CHANNEL
        )
        decay = tl.zeros((BLOCK_D,), tl.float32) + tl.exp(decay.to(tl.float32))
        q, k = q.to(tl.float32), k.to(tl.float32)
        if NORMALISES:
            q *= tl.rsqrt(tl.sum(q * q) + 1e-6)
            k *= tl.rsqrt(tl.sum(k * k) + 1e-6)
        q *= scale
        known = tl.sum(state * (k * decay)[:, None], axis=0)
        read = tl.sum(state * (q * decay)[:, None], axis=0)
        error = (v.to(tl.float32) - known) * beta.to(tl.float32)
        y = read + tl.sum(q * k) * error
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask_v)
        y_ptrs += H * D_V
        gained = k[:, None] * error[None, :]
        state = tl.fma(state, tl.broadcast_to(decay[:, None], gained.shape), gained)
        q, k, v, decay, beta = following
    tl.store(state_ptrs, state, mask)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    normalises: bool,
) -> torch.Tensor:
    """query, key [B, T, H_k, D], value [B, T, H, D_v] -> [B, T, H, D_v]; the state moves on.

    decay [B, T, H] or [B, T, H, D], beta [B, T, H], state [B, H, D, D_v] float32 and contiguous.
    Raises ValueError for other shapes, TypeError for other dtypes.
    """
    device.require_float("gated_delta_rule", query, key, value, decay, beta)
    (batch, length, key_heads, d), (*_, heads, d_v) = key.shape, value.shape
    if state.dtype != torch.float32 or state.data_ptr() % 16 or not state.is_contiguous():
        raise ValueError("the state of a gated delta rule is float32, contiguous and aligned")
    if query.shape != key.shape or state.shape != (batch, heads, d, d_v) or heads % key_heads:
        raise ValueError(f"query {tuple(query.shape)}, key and state {tuple(state.shape)} differ")
    if d > _MOST_D:
        raise ValueError(f"a gated delta rule over {d} channels of a head: at most {_MOST_D}")
    y = torch.empty(batch, length, heads, d_v, dtype=value.dtype, device=value.device)
    if y.numel():
        q, k, v = (device.aligned_rows(t.flatten(2)) for t in (query, key, value))
        block_d = triton.next_power_of_2(d)
        block_v = min(_BLOCK_V, _TILE // block_d, triton.next_power_of_2(d_v))
        _gated_delta_kernel[(triton.cdiv(d_v, block_v), heads, batch)](
            q, k, v, _packed(decay), _packed(beta), state, y, length, heads,
            q.stride(0), k.stride(0), v.stride(0), d**-0.5,
            GROUP=heads // key_heads, D=d, D_V=d_v, BY_CHANNEL=decay.dim() == 4,
            NORMALISES=normalises, BLOCK_D=block_d, BLOCK_V=block_v,
            num_warps=1, enable_fp_fusion=True, **pdl(y.device),
        )  # fmt: skip
    return y


def _packed(x: torch.Tensor) -> torch.Tensor:
    """Contiguous and aligned, whatever view it came from: see `device.aligned_rows`."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
