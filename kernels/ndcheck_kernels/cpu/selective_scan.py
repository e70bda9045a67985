"""The selective scan on CPU, one token at a time.

Computes: `ops.selective_scan`.
Reduction order: tokens in order; the sum over a state by halves, the first half added to the second
    until one is left; then D x.
Depends on: the row's own tokens up to this one. Never on where a pass begins.
Dtypes: float32, bfloat16, float16; states and all steps are float32, y is rounded once.
Not claimed: speed at prefill, where a loop over tokens replaces chunks.
"""

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ndcheck_kernels.ops.selective_scan import scan_op
from ndcheck_kernels.scope.registry import implements

# Decays of so many tokens at once: those of a whole prompt may be larger than the model.
_BLOCK = 32


@implements(scan_op, device="cpu")
def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    state: torch.Tensor,
) -> torch.Tensor:
    """Shapes as in `ops.selective_scan`."""
    heads = x.shape[2]
    y = torch.empty(x.shape, dtype=torch.float32)
    for begin in range(0, x.shape[1], _BLOCK):
        part = slice(begin, begin + _BLOCK)
        steps = dt[:, part, :, None]
        decays = torch.exp(steps * A.view(heads, -1))[:, :, :, None]  # [B, T, H, 1, N or 1]
        inputs = x[:, part].float()
        b, c = (v[:, part].float().repeat_interleave(heads // v.shape[2], 2) for v in (B, C))
        # Single products and sums, which the mode would pass one by one, at twice the time.
        with _disable_current_modes():
            skipped = inputs * D.float()[:, None]
            inputs = (inputs * steps)[..., None]
            for t in range(inputs.shape[1]):
                state.mul_(decays[:, t]).add_(inputs[:, t] * b[:, t, :, None])
                y[:, begin + t] = _sum_by_halves(state * c[:, t, :, None]) + skipped[:, t]
    return y.to(x.dtype)


def _sum_by_halves(x: torch.Tensor) -> torch.Tensor:
    """[..., N] -> [...], by single additions: no kernel can choose another order."""
    while (size := x.shape[-1]) > 1:
        first, second, *rest = x.split(size // 2, -1)
        x = torch.cat([first + second, *rest], -1) if rest else first + second
    return x.squeeze(-1)
