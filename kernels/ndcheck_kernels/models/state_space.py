"""Mamba's mixers and LFM2's short convolution by one arithmetic, wherever a pass begins.

Computes: what transformers' mixers of Mamba-2's kind (Bamba, Falcon-H1, Granite, Nemotron-H,
    Zamba 2), of Mamba's (Falcon-Mamba, Jamba) and LFM2's short convolutions do, with the scan and
    convolution of one token for prefill, chunked prefill and decode alike.
Reduction order: that of `ops.selective_scan`, of the convolution and of the products.
Depends on: the row's own tokens up to this one. Columns of padding are set to zero before the
    convolution and before the scan, so a state begins at the row's own first token.
Dtypes: those of the model; time steps and states are float32.
Not claimed: training, packed sequences. Limits on time steps hold in decode as in prefill, where
    transformers has them in prefill alone; and Mamba's kind continues a prefill, where
    transformers begins from an empty state.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ndcheck_kernels.models.caches.argument import given_cache
from ndcheck_kernels.models.interface import is_of_transformers
from ndcheck_kernels.ops.selective_scan import scan_op
from ndcheck_kernels.ops.short_convolution import short_convolution_op, short_convolution_step_op
from ndcheck_kernels.scope.refusal import refusal
from ndcheck_kernels.scope.state import active_scope

Forward = Callable[..., torch.Tensor]

_PACKED = ("seq_idx", "cu_seqlens", "cu_seq_lens_q")


def is_covered(layer: torch.nn.Module) -> bool:
    """Whether a layer is a mixer that `replace_mixers` knows."""
    is_known = type(layer).__name__ in _FORWARDS and is_of_transformers(layer)
    return is_known and _states_are_numbered()


@functools.cache
def _states_are_numbered() -> bool:
    """Since transformers 5.17; before, a cache's layer has one state of a kind."""
    from transformers.cache_utils import LinearAttentionLayer

    return isinstance(getattr(LinearAttentionLayer(), "conv_states", None), dict)


def replace_mixers(model: torch.nn.Module) -> None:
    """Let a model's mixers take another way inside a scope; once."""
    for mixer in {type(module) for module in model.modules() if is_covered(module)}:
        own = mixer.forward
        if not hasattr(own, "invariant"):
            mixer.forward = _choosing(own, _FORWARDS[mixer.__name__])


def _choosing(own: Forward, invariant: Forward) -> Forward:
    @functools.wraps(own)
    def forward(mixer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (own if active_scope() is None else invariant)(mixer, *args, **kwargs)

    forward.invariant = invariant  # type: ignore[attr-defined]
    return forward


def _mamba2(
    mixer: Any,
    hidden_states: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """[B, T, hidden] -> [B, T, hidden]."""
    _require_rows(mixer, hidden_states, kwargs)
    cache = given_cache(kwargs)
    hidden = _without_padding(hidden_states, attention_mask)
    if (multiplier := getattr(mixer, "ssm_in_multiplier", None)) is not None:
        hidden = hidden * multiplier
    projected = mixer.in_proj(hidden)
    if (multipliers := getattr(mixer, "mup_vector", None)) is not None:
        projected = projected * multipliers
    width, heads = mixer.intermediate_size, mixer.num_heads
    gate, mixed, dt = projected.split([width, mixer.conv_dim, heads], -1)
    mixed = _convolve(mixer, mixer.conv1d, mixed, cache, attention_mask, mixer.activation)
    n_states = (mixer.conv_dim - width) // 2
    x, B, C = mixed.split([width, n_states, n_states], -1)
    dt = F.softplus(dt.float() + mixer.dt_bias.float()).clamp(*mixer.time_step_limit)
    x = x.unflatten(-1, (heads, -1))
    B, C = (v.unflatten(-1, (mixer.n_groups, -1)) for v in (B, C))
    state = _recurrent_state(mixer, cache, x, B.shape[-1])
    y = scan_op(x, dt, -torch.exp(mixer.A_log.float()), B, C, mixer.D, state).flatten(2)
    has_norm = not isinstance(mixer.norm, torch.nn.Identity)  # Falcon-H1 may have none.
    y = mixer.norm(y, gate) if has_norm else y * F.silu(gate)
    return torch.as_tensor(mixer.out_proj(y.to(hidden_states.dtype)))


def _mamba(
    mixer: Any,
    hidden_states: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """[B, T, hidden] -> [B, T, hidden]."""
    _require_rows(mixer, hidden_states, kwargs)
    cache = given_cache(kwargs)
    x, gate = mixer.in_proj(_without_padding(hidden_states, attention_mask)).chunk(2, -1)
    x = _convolve(mixer, mixer.conv1d, x, cache, attention_mask, mixer.activation)
    n_states = mixer.ssm_state_size
    dt, B, C = mixer.x_proj(x).split([mixer.time_step_rank, n_states, n_states], -1)
    if hasattr(mixer, "dt_layernorm"):  # Falcon-Mamba and Jamba.
        dt, B, C = mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)
    dt = F.linear(dt, mixer.dt_proj.weight).float()
    dt = F.softplus(dt if mixer.dt_proj.bias is None else dt + mixer.dt_proj.bias.float())
    # A channel is a head of one feature, and all of them share one B and one C.
    state = _recurrent_state(mixer, cache, x, n_states)[:, :, None]
    A = -torch.exp(mixer.A_log.float())
    y = scan_op(x[..., None], dt, A, B[:, :, None], C[:, :, None], mixer.D, state)
    return torch.as_tensor(mixer.out_proj(y.squeeze(-1) * F.silu(gate)))


def _short_convolution(
    mixer: Any,
    hidden_states: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """[B, T, hidden] -> [B, T, hidden]."""
    _require_rows(mixer, hidden_states, kwargs)
    cache = given_cache(kwargs)
    hidden = _without_padding(hidden_states, attention_mask)
    before, after, x = mixer.in_proj(hidden).chunk(3, -1)
    mixed = _convolve(mixer, mixer.conv, before * x, cache, attention_mask, None)
    return torch.as_tensor(mixer.out_proj(after * mixed))


_FORWARDS: dict[str, Forward] = {
    **dict.fromkeys(
        (
            *("Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer"),
            *("NemotronHMamba2Mixer", "Zamba2MambaMixer"),
        ),
        _mamba2,
    ),
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer"), _mamba),
    **dict.fromkeys(("Lfm2ShortConv", "Lfm2MoeShortConv"), _short_convolution),
}


def _require_rows(mixer: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> None:
    if mixer.training or any(kwargs.get(name) is not None for name in _PACKED):
        reason = "no training, and no packed sequences"
        raise refusal("selective_scan", x.dtype, x.device.type, reason)


def _without_padding(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x [B, T, N], zero where the mask [B, T] is; products with the mask would keep NaN and -0."""
    return x if mask is None else torch.where(mask[..., None].bool(), x, 0.0)


def _convolve(
    mixer: Any,
    conv: torch.nn.Conv1d,
    x: torch.Tensor,
    cache: Any,
    mask: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    """x [B, T, C] through the causal convolution, after what the cache holds of earlier tokens."""
    x = _without_padding(x, mask).transpose(1, 2)
    weight, length = conv.weight.squeeze(1), x.shape[2]
    if cache is not None:
        layer = cache.layers[mixer.layer_idx]
        if not layer.has_previous_state[0]:
            layer.update_conv_state(x.new_zeros(*x.shape[:2], weight.shape[1]))
        state = layer.conv_states[0]
        if length == 1:
            x = short_convolution_step_op(x, state, weight, conv.bias, activation)
            return _without_padding(x.transpose(1, 2), mask)
        x = torch.cat([state, x], -1)
        state.copy_(x[..., -state.shape[2] :])
    x = short_convolution_op(x, weight, conv.bias, activation)[..., -length:]
    return _without_padding(x.transpose(1, 2), mask)


def _recurrent_state(mixer: Any, cache: Any, x: torch.Tensor, n_states: int) -> torch.Tensor:
    """The state after the tokens before, [B, *features, N] float32, to be written in place."""
    layer = None if cache is None else cache.layers[mixer.layer_idx]
    if layer is None or not layer.is_recurrent_states_initialized[0]:
        state = x.new_zeros(x.shape[0], *x.shape[2:], n_states, dtype=torch.float32)
        if layer is None:
            return state
        layer.update_recurrent_state(state)
    return torch.as_tensor(layer.recurrent_states[0])
