"""The causal depthwise convolution over a row's last tokens, with silu.

Computes: y[t] = silu(sum over k of weight[k] * x[t - K + 1 + k] + bias) in fp32, by channel, one
    rounding at the end; a step takes the earlier tokens from a state, and moves that on.
Reduction order: taps oldest first, each a fused multiply-add onto the sum of those before it, then
    the bias; a thread computes an element by itself.
Depends on: K, dtype, architecture, Triton version.
Dtypes: bfloat16, float16, float32; weight, bias and state may have another of them.
Not claimed: gradients; the bits of torch's convolution, which rounds before silu.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.ops.short_convolution import has_silu

_BLOCK_T = 4
_BLOCK_C = 256


@triton.jit
def _finish(acc, bias_ptr, offs_c, mask_c, HAS_BIAS: tl.constexpr, SILU: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_c, mask_c, other=0.0).to(tl.float32)
    if SILU:
        acc = acc / (1.0 + tl.exp(-acc))
    return acc


# Strides may be known to the compiler: no sum here is over more than one thread.
@triton.jit(do_not_specialize=["T"])
def _convolution_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, T, C, stride_xb, stride_xc, stride_xt,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    batch = tl.program_id(2).to(tl.int64)
    offs_t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask_c = offs_c < C
    x_ptrs = x_ptr + batch * stride_xb + offs_c.to(tl.int64) * stride_xc
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for tap in tl.static_range(TAPS):
        at = offs_t + (tap + 1 - TAPS)
        x = tl.load(x_ptrs + at * stride_xt, mask_c & (at >= 0) & (at < T), other=0.0)
        weight = tl.load(weight_ptr + offs_c * TAPS + tap, mask_c, other=0.0).to(tl.float32)
        acc = tl.fma(x.to(tl.float32), tl.broadcast_to(weight, acc.shape), acc)
    acc = _finish(acc, bias_ptr, offs_c, mask_c, HAS_BIAS, SILU)
    y_ptrs = y_ptr + (batch * T + offs_t) * C + offs_c
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask_c & (offs_t < T))


@triton.jit
def _convolution_step_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr, C, stride_xb, stride_xc,
    TAPS: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    batch = tl.program_id(1).to(tl.int64)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    rows = state_ptr + (batch * C + offs_c) * WIDTH
    newest = tl.load(x_ptr + batch * stride_xb + offs_c.to(tl.int64) * stride_xc, mask_c, other=0.0)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for tap in tl.static_range(TAPS):
        if tap < TAPS - 1:
            x = tl.load(rows + (WIDTH - TAPS + 1 + tap), mask_c, other=0.0)
        else:
            x = newest
        weight = tl.load(weight_ptr + offs_c * TAPS + tap, mask_c, other=0.0).to(tl.float32)
        acc = tl.fma(x.to(tl.float32), weight, acc)
    place = tl.arange(0, BLOCK_W)[None, :]
    mask = mask_c[:, None] & (place < WIDTH)
    moved = tl.load(rows[:, None] + place + 1, mask & (place < WIDTH - 1), other=0.0)
    moved = tl.where(place == WIDTH - 1, newest[:, None], moved)
    tl.debug_barrier()  # Another thread may still have to read what is written now.
    tl.store(rows[:, None] + place, moved, mask)
    acc = _finish(acc, bias_ptr, offs_c, mask_c, HAS_BIAS, SILU)
    tl.store(y_ptr + batch * C + offs_c, acc.to(y_ptr.dtype.element_ty), mask_c)


def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """x [B, C, T], weight [C, K], bias [C] -> [B, C, T], laid out as [B, T, C] is.

    x may be laid out either way. Before the first token there are zeros.
    """
    device.require_float("short_convolution", x, weight, bias)
    silu, (batch, channels, length) = has_silu(activation), x.shape
    y = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
    if y.numel():
        weight = weight.contiguous()
        block_c = min(triton.next_power_of_2(channels), _BLOCK_C)
        grid = (triton.cdiv(channels, block_c), triton.cdiv(length, _BLOCK_T), batch)
        _convolution_kernel[grid](
            x, weight, weight if bias is None else bias, y, length, channels, *x.stride(),
            TAPS=weight.shape[1], HAS_BIAS=bias is not None, SILU=silu,
            BLOCK_T=_BLOCK_T, BLOCK_C=block_c, num_warps=4, **pdl(y.device),
        )  # fmt: skip
    return y.transpose(1, 2)


def short_convolution_step(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """x [B, C, 1] -> [B, C, 1], after the tokens in state [B, C, >= K - 1], which moves on."""
    device.require_float("short_convolution", x, state, weight, bias)
    silu, (batch, channels, length), width = has_silu(activation), x.shape, state.shape[2]
    if length != 1 or state.shape[:2] != x.shape[:2] or width < weight.shape[1] - 1:
        raise ValueError(f"a step takes one token and {weight.shape[1] - 1} or more before it")
    if state.dtype != x.dtype or not state.is_contiguous():
        raise ValueError("the state of a convolution is contiguous and has the dtype of its input")
    y = torch.empty(batch, channels, 1, dtype=x.dtype, device=x.device)
    if y.numel():
        weight = weight.contiguous()
        block_c = min(triton.next_power_of_2(channels), _BLOCK_C)
        _convolution_step_kernel[(triton.cdiv(channels, block_c), batch)](
            x, state, weight, weight if bias is None else bias, y, channels, *x.stride()[:2],
            TAPS=weight.shape[1], WIDTH=width, HAS_BIAS=bias is not None, SILU=silu,
            BLOCK_C=block_c, BLOCK_W=triton.next_power_of_2(width), num_warps=2, **pdl(y.device),
        )  # fmt: skip
    return y
