"""The ops of a causal depthwise convolution over the last few tokens of a row.

Each channel is convolved by itself, through `activation`: None, "silu" or its other name "swish":
y[b, c, t] = bias[c] + sum over k of weight[c, k] * x[b, c, t - K + 1 + k].
"""

from ndcheck_kernels.ops.library import declare
from ndcheck_kernels.scope.refusal import UnsupportedCallError

# x [B, C, T], weight [C, K], bias [C] -> [B, C, T]; before the first token there are zeros.
short_convolution_op = declare(
    "short_convolution(Tensor x, Tensor weight, Tensor? bias=None, str? activation=None) -> Tensor"
)
# The same for x [B, C, 1] after the tokens in state [B, C, >= K - 1], which moves on.
short_convolution_step_op = declare(
    "short_convolution_step(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias=None, "
    "str? activation=None) -> Tensor"
)


def has_silu(activation: str | None) -> bool:
    """Raises UnsupportedCallError for an activation that the ops do not have."""
    if activation not in (None, "silu", "swish"):
        raise UnsupportedCallError(f"it has no activation {activation!r}, only silu")
    return activation is not None
