"""The gated delta rule of hybrid models, one token at a time, and its short convolution.

Computes: what transformers' `torch_recurrent_gated_delta_rule` does, for prefill, chunked prefill
    and decode alike; and a causal depthwise convolution over the last few tokens.
Reduction order: tokens in order, and inside a token that of its sums over head_dim; taps of the
    convolution oldest first, in float32, rounded once.
Depends on: the row's own tokens up to this one. Never on where a chunk begins: the chunked form
    counts chunks from the first column, padded or not, and another form decodes.
Dtypes: those of the model; states are float32.
Not claimed: speed at prefill, where a loop over tokens replaces chunks.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from ndcheck_kernels.mode import active_scope

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
        rule = inspect.unwrap(getattr(source, RULE))
        _replace(source, RULE, rule)
        _replace(source, _CHUNKED_RULE, rule)
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


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """x [B, C, T], weight [C, K] -> [B, C, T]; before the first token there are zeros."""
    return _convolve(F.pad(x, (weight.shape[1] - 1, 0)), weight, bias, activation).to(x.dtype)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """As `causal_conv1d`, after the tokens in conv_state [B, C, >= K - 1], which moves on."""
    window = torch.cat([conv_state, x], -1)
    conv_state.copy_(window[..., -conv_state.shape[-1] :])
    window = window[..., -(x.shape[-1] + weight.shape[1] - 1) :]
    return _convolve(window, weight, bias, activation).to(x.dtype)


def _convolve(
    window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """[B, C, T + K - 1] -> [B, C, T]."""
    from transformers.activations import ACT2FN

    taps = weight.shape[1]
    length = window.shape[-1] - taps + 1
    total = window[..., :length].float() * weight[:, :1].float()
    for tap in range(1, taps):
        total = total + window[..., tap : tap + length].float() * weight[:, tap : tap + 1].float()
    out = (total if bias is None else total + bias[:, None].float()).to(weight.dtype)
    return out if activation is None else ACT2FN[activation](out)
