"""The causal depthwise convolution over a row's last tokens.

Computes: what torch's conv1d with one group a channel does, then silu.
Reduction order: taps oldest first, in float32, then the bias; rounded once before silu.
Depends on: the row's own last tokens. Never on where a chunk begins.
Dtypes: those of the model.
Not claimed: gradients.
"""

import torch
import torch.nn.functional as F

from ndcheck_kernels.cpu.pointwise import pointwise
from ndcheck_kernels.ops.short_convolution import (
    has_silu,
    short_convolution_op,
    short_convolution_step_op,
)
from ndcheck_kernels.scope.registry import implements


@implements(short_convolution_op, device="cpu")
def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """x [B, C, T], weight [C, K], bias [C] -> [B, C, T]; before the first token there are zeros."""
    return _convolve(F.pad(x, (weight.shape[1] - 1, 0)), weight, bias, activation).to(x.dtype)


@implements(short_convolution_step_op, device="cpu")
def short_convolution_step(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """x [B, C, 1], after the tokens in state [B, C, >= K - 1], which moves on."""
    window = torch.cat([state, x], -1)
    state.copy_(window[..., 1:])
    return _convolve(window[..., -weight.shape[1] :], weight, bias, activation).to(x.dtype)


def _convolve(
    window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """[B, C, T + K - 1] -> [B, C, T]."""
    taps = weight.shape[1]
    length = window.shape[-1] - taps + 1
    total = window[..., :length].float() * weight[:, :1].float()
    for tap in range(1, taps):
        total = total + window[..., tap : tap + length].float() * weight[:, tap : tap + 1].float()
    out = (total if bias is None else total + bias[:, None].float()).to(weight.dtype)
    if not has_silu(activation):
        return out
    activated: torch.Tensor = pointwise(torch.ops.aten.silu.default, out)
    return activated
