"""The gated delta rule on CPU, one token at a time.

Computes: `ops.gated_delta`, for prefill, chunked prefill and decode alike.
Reduction order: tokens in order; sums over D by halves, the first half added to the second until
    one is left.
Depends on: the row's own tokens up to this one. Never on where a chunk begins: transformers'
    chunked form counts chunks from the first column, padded or not, and another form decodes.
Dtypes: those of the model; the state is float32.
Not claimed: speed at prefill, where a loop over tokens replaces chunks.
"""

import torch

from ndcheck_kernels.cpu.pointwise import pointwise
from ndcheck_kernels.ops.gated_delta import gated_delta_op
from ndcheck_kernels.scope.registry import implements

aten = torch.ops.aten


@implements(gated_delta_op, device="cpu")
def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    normalises: bool,
) -> torch.Tensor:
    """query, key [B, T, H_k, D], value [B, T, H, D_v] -> [B, T, H, D_v]; the state moves on."""
    repeats = value.shape[2] // key.shape[2]
    query, key = (t.float().repeat_interleave(repeats, 2)[..., None] for t in (query, key))
    if normalises:
        query, key = (
            t * pointwise(aten.rsqrt.default, _sum_by_halves(t * t)[..., None] + 1e-6)
            for t in (query, key)
        )
    query = query / query.shape[-2] ** 0.5
    decay = pointwise(aten.exp.default, decay.float())
    decay = decay[..., None] if decay.dim() == 4 else decay[..., None, None]
    values = value.float()
    out, now = torch.empty_like(values), state
    operands = (query, key, values, decay, beta.float()[..., None])
    for t, (q, k, v, d, b) in enumerate(zip(*(x.unbind(1) for x in operands), strict=True)):
        now = now * d
        error = (v - _sum_by_halves(now * k)) * b
        now = now + k * error[:, :, None]
        out[:, t] = _sum_by_halves(now * q)
    state.copy_(now)
    return out.to(value.dtype)


def _sum_by_halves(x: torch.Tensor) -> torch.Tensor:
    """[..., D, N] -> [..., N], by single additions: no kernel can choose another order."""
    while (size := x.shape[-2]) > 1:
        first, second, *rest = x.split(size // 2, -2)
        x = torch.cat([first + second, *rest], -2) if rest else first + second
    return x.squeeze(-2)
