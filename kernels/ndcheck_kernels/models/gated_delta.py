"""The gated delta rule of hybrid models, one token at a time, and its short convolution.

Computes: what transformers' `torch_recurrent_gated_delta_rule` does, for prefill, chunked prefill
    and decode alike; and a causal depthwise convolution over the last few tokens.
Reduction order: tokens in order; sums over head_dim by halves, the first half added to the second
    until one is left; taps of the convolution oldest first, in float32, rounded once.
Depends on: the row's own tokens up to this one. Never on where a chunk begins: the chunked form
    counts chunks from the first column, padded or not, and another form decodes.
Dtypes: those of the model; states are float32.
Not claimed: speed at prefill, where a loop over tokens replaces chunks.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ndcheck_kernels.ops.short_convolution import short_convolution_op, short_convolution_step_op
from ndcheck_kernels.scope.refusal import refusal
from ndcheck_kernels.scope.state import active_scope

RULE = "torch_recurrent_gated_delta_rule"
_CHUNKED_RULE = "torch_chunk_gated_delta_rule"

Function = Callable[..., Any]


def is_covered(layer: torch.nn.Module) -> bool:
    """Whether a layer computes the gated delta rule by functions that can be replaced."""
    return "DeltaNet" in type(layer).__name__ and hasattr(sys.modules[type(layer).__module__], RULE)


def replace_recurrences(model: torch.nn.Module) -> None:
    """Let the gated delta layers of a model take another way inside a scope; once."""
    for name in {type(module).__module__ for module in model.modules()}:
        source = sys.modules[name]
        if not hasattr(source, RULE):
            continue
        _replace(source, RULE, gated_delta_rule)
        _replace(source, _CHUNKED_RULE, gated_delta_rule)
        _replace(source, "causal_conv1d_fn", causal_conv1d)
        _replace(source, "causal_conv1d_update", causal_conv1d_update)


def _replace(source: ModuleType, name: str, invariant: Function) -> None:
    own = getattr(source, name, None)
    if own is None or hasattr(own, "invariant"):
        return

    @functools.wraps(own)
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (own if active_scope() is None else invariant)(*args, **kwargs)

    choose.invariant = invariant  # type: ignore[attr-defined]
    setattr(source, name, choose)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query, key [B, T, H_k, D], value [B, T, H, D_v], g and beta [B, T, H] -> [B, T, H, D_v].

    The state is [B, H, D, D_v] float32; the outputs are those of `gated_delta_reference`.
    """
    if kwargs.get("cu_seqlens") is not None:
        raise refusal("gated delta rule", query.dtype, query.device.type, "sequences are packed")
    repeats = value.shape[2] // key.shape[2]
    query, key = (t.float().repeat_interleave(repeats, 2) for t in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (query, key))
    query = (query / query.shape[-1] ** 0.5)[..., None]
    key, decay, beta = key[..., None], g.float().exp()[..., None, None], beta.float()[..., None]
    values = value.float()
    if initial_state is None:
        batch, _, heads, width, _ = key.shape
        state = values.new_zeros(batch, heads, width, value.shape[-1])
    else:
        state = initial_state.float()
    out = torch.empty_like(values)
    # Single products and sums, which the mode would pass one by one, at twice the time.
    with _disable_current_modes():
        for t, (q, k, v, d, b) in enumerate(
            zip(*(x.unbind(1) for x in (query, key, values, decay, beta)), strict=True)
        ):
            state = state * d
            error = (v - _sum_by_halves(state * k)) * b
            state = state + k * error[:, :, None]
            out[:, t] = _sum_by_halves(state * q)
    return out.to(value.dtype), state if output_final_state else None


def _sum_by_halves(x: torch.Tensor) -> torch.Tensor:
    """[..., D, N] -> [..., N], by single additions: no kernel can choose another order."""
    while (size := x.shape[-2]) > 1:
        first, second, *rest = x.split(size // 2, -2)
        x = torch.cat([first + second, *rest], -2) if rest else first + second
    return x.squeeze(-2)


def causal_conv1d(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """As `short_convolution_op`, under the names that transformers has."""
    result: torch.Tensor = short_convolution_op(hidden_states, weight, bias, activation)
    return result


def causal_conv1d_update(
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """As `short_convolution_step_op`; conv_state moves on."""
    result: torch.Tensor = short_convolution_step_op(
        hidden_states, conv_state, weight, bias, activation
    )
    return result
