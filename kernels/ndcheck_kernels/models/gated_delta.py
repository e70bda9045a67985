"""The gated delta rule of hybrid models, and its short convolution, in the place of transformers'.

Prefill, chunked prefill and decode become one op each, which takes a row's tokens in order:
transformers' chunked form counts chunks from the first column, padded or not, and another form
decodes.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ndcheck_kernels.ops.gated_delta import gated_delta_op
from ndcheck_kernels.ops.short_convolution import short_convolution_op, short_convolution_step_op
from ndcheck_kernels.scope.refusal import refusal
from ndcheck_kernels.scope.state import active_scope

# One token at a time, and in chunks; Kimi's has a decay of its own for each channel of a key.
_RULES = (
    *("torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"),
    *("recurrent_kimi_delta_attention", "chunk_kimi_delta_attention"),
)

Function = Callable[..., Any]


def is_covered(layer: torch.nn.Module) -> bool:
    """Whether a layer computes the gated delta rule by functions that can be replaced."""
    return "Delta" in type(layer).__name__ and _has_rule(sys.modules[type(layer).__module__])


def _has_rule(source: ModuleType) -> bool:
    return any(hasattr(source, name) for name in _RULES)


def replace_recurrences(model: torch.nn.Module) -> None:
    """Let the gated delta layers of a model take another way inside a scope; once."""
    for name in {type(module).__module__ for module in model.modules()}:
        source = sys.modules[name]
        if not _has_rule(source):
            continue
        for rule in _RULES:
            _replace(source, rule, gated_delta_rule)
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

    g may be [B, T, H, D]. The state is [B, H, D, D_v] float32. One that is given moves on, which
    saves copying it: layers write it back to where they have it from.
    """
    if kwargs.get("cu_seqlens") is not None:
        raise refusal("gated delta rule", query.dtype, query.device.type, "sequences are packed")
    if initial_state is None:
        shape = (*value.shape[::2], key.shape[-1], value.shape[-1])
        state = torch.zeros(shape, dtype=torch.float32, device=value.device)
    else:
        state = initial_state.float()
    out: torch.Tensor = gated_delta_op(
        query, key, value, g, beta, state, normalises=use_qk_l2norm_in_kernel
    )
    return out, state if output_final_state else None


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
