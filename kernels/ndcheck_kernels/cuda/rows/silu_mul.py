"""silu(gate) * up in one pass.

Computes: round(round(silu(gate)) * up), each step in fp32; the inner rounding is the one that two
    separate ops would make, so fusing costs no bits.
Reduction order: none; every element depends on its own two inputs.
Depends on: dtype, architecture, Triton version.
Dtypes: bfloat16, float16, float32.
Not claimed: gradients; the bits of torch's silu.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.dependent_launch import follow, pdl


@triton.jit
def silu_times(gate, up):
    """As the module says, in fp32 before the last rounding; both of one dtype."""
    x = gate.to(tl.float32)
    silu = (x / (1.0 + tl.exp(-x))).to(gate.dtype)
    return silu.to(tl.float32) * up.to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def _silu_mul_kernel(
    gate_ptr, up_ptr, y_ptr, M, N, stride_gm, stride_um, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_n < N
    gate = tl.load(gate_ptr + row * stride_gm + offs_n, mask, other=0.0)
    up = tl.load(up_ptr + row * stride_um + offs_n, mask, other=0.0)
    y = silu_times(gate, up)
    tl.store(y_ptr + row * N + offs_n, y.to(y_ptr.dtype.element_ty), mask)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate and up may be the two halves of one [..., 2 N] projection: no copy is made."""
    device.require_float("silu_mul", gate, up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype} {tuple(gate.shape)}, up is unlike it")
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        gate, up = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
        gate, up = (t if t.stride(1) == 1 else t.contiguous() for t in (gate, up))
        m, n = gate.shape
        block = min(triton.next_power_of_2(n), 2048)
        _silu_mul_kernel[(m, triton.cdiv(n, block))](
            gate, up, y, m, n, gate.stride(0), up.stride(0), BLOCK=block, num_warps=4,
            enable_fp_fusion=True, **pdl(y.device),
        )  # fmt: skip
    return y
