"""The attention op in modules that compute softmax over padded keys themselves, with no interface.

Computes: what BLOOM's, MPT's, Falcon's and GPT-J's modules do: softmax(scale * q k^T + bias) v.
    With ALiBi the bias is slope * position, counted from the row's first token, and rounded where
    the model rounds it: to its dtype in BLOOM, to bfloat16 in Falcon, nowhere in MPT.
Reduction order: that of the attention op.
Depends on: what the attention op does.
Dtypes: those of the attention op.
Not claimed: training, dropout, returned weights, slices for tensor parallelism (BLOOM's
    pretraining_tp > 1): refused.
"""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from ndcheck_kernels.models.caches.argument import given_cache
from ndcheck_kernels.models.interface import is_of_transformers
from ndcheck_kernels.ops.attention import attention_op, causal_spans, spans_from_any
from ndcheck_kernels.scope.refusal import refusal
from ndcheck_kernels.scope.state import active_scope

Function = Callable[..., Any]


def is_covered(module: torch.nn.Module) -> bool:
    """Whether a module's own attention is one of those that are replaced."""
    name, _ = _REPLACED.get(type(module).__name__, ("", None))
    return hasattr(module, name) and is_of_transformers(module)


def replace_attention(model: torch.nn.Module) -> None:
    """Let a model's own attention take another way inside a scope; once."""
    for kind in {type(module) for module in model.modules() if is_covered(module)}:
        name, invariant = _REPLACED[kind.__name__]
        own = getattr(kind, name)
        if not hasattr(own, "invariant"):
            setattr(kind, name, _choose(own, invariant))


def _choose(own: Function, invariant: Function) -> Function:
    @functools.wraps(own)
    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        if active_scope() is None:
            return own(module, *args, **kwargs)
        if module.training or kwargs.get("output_attentions"):
            dtype, where = next((p.dtype, p.device.type) for p in module.parameters())
            raise refusal("attention", dtype, where, "no training, no returned weights")
        return invariant(module, *args, **kwargs)

    forward.invariant = invariant  # type: ignore[attr-defined]
    return forward


def _spans(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return causal_spans(query.shape[0], key.shape[2], query.device)
    spans = spans_from_any(mask, False, query, key)
    # One query's are causal as they are, which a captured step cannot ask the device.
    return spans if query.shape[2] > 1 else spans[..., ::2]


def _bloom(
    module: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    alibi: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if module.pretraining_tp > 1 and module.slow_but_exact:
        where = hidden_states.device.type
        raise refusal("attention", hidden_states.dtype, where, "no tensor-parallel slices")
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    if (cache := given_cache(kwargs)) is not None:
        key, value = cache.update(key, value, module.layer_idx)
    out = attention_op(
        query, key, value, _spans(attention_mask, query, key), module.inv_norm_factor,
        slopes=alibi_slopes(module.num_heads, query.device), bias_dtype=query.dtype,
    )  # fmt: skip
    return residual + module.dense(out.transpose(1, 2).flatten(2)), None


def _mpt(
    module: Any,
    hidden_states: torch.Tensor,
    position_bias: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    heads = qkv.unflatten(2, (3, module.n_heads, module.head_dim))
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    if (cache := given_cache(kwargs)) is not None:
        key, value = cache.update(key, value, module.layer_idx)
    hidden = attention_mask
    out = attention_op(
        query, key, value, _spans(None if hidden is None else ~hidden, query, key),
        module.softmax_scale, slopes=mpt_slopes(module.n_heads, query.device),
    )  # fmt: skip
    return module.out_proj(out.transpose(1, 2).flatten(2)), None


def _falcon(
    module: Any,
    hidden_states: torch.Tensor,
    alibi: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    fused = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (t.transpose(1, 2) for t in fused)
    if alibi is None:
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        query, key = rotate(query, key, *kwargs["position_embeddings"])
    if (cache := given_cache(kwargs)) is not None:
        key, value = cache.update(key, value, module.layer_idx)
    scale = module.head_dim**-0.5
    bias: dict[str, Any] = {}
    if alibi is not None:
        slopes = alibi_slopes(module.num_heads, query.device).bfloat16().float() * scale
        bias = {"slopes": slopes, "bias_dtype": torch.bfloat16}
        if attention_mask is not None:
            # The model has added its bias to the mask, the same keys hidden in every head.
            attention_mask = attention_mask[:, :1] > torch.finfo(attention_mask.dtype).min
    spans = _spans(attention_mask, query, key)
    out = attention_op(query, key, value, spans, scale, **bias)
    return module.dense(out.transpose(1, 2).flatten(2)), None


def _gptj(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """The part after the rotation and the cache."""
    spans = _spans(attention_mask, query, key)
    return attention_op(query, key, value, spans, module.head_dim**-0.5), None


# By class: the method that is replaced, and what replaces it. Since transformers 5.24 GPT-J has an
# interface in its place.
_REPLACED: dict[str, tuple[str, Function]] = {
    "BloomAttention": ("forward", _bloom),
    "MptAttention": ("forward", _mpt),
    "FalconAttention": ("forward", _falcon),
    "GPTJAttention": ("_attn", _gptj),
}


@functools.lru_cache(maxsize=16)
def alibi_slopes(heads: int, device: torch.device) -> torch.Tensor:
    """[heads] float32, geometric from 2^(-8/n) (Press, Smith and Lewis 2022).

    Without a power of two of heads, every second slope of twice as many fills up.
    """
    whole = 2 ** math.floor(math.log2(heads))
    steps = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    steps += [2 ** (-4 * (i + 1) / whole) for i in range(0, 2 * (heads - whole), 2)]
    return torch.tensor(steps, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=16)
def mpt_slopes(heads: int, device: torch.device) -> torch.Tensor:
    """As `alibi_slopes`; of the next power of two of heads, every second slope goes first."""
    whole = 2 ** math.ceil(math.log2(heads))
    steps = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    if whole != heads:
        steps = (steps[1::2] + steps[::2])[:heads]
    return torch.tensor(steps, dtype=torch.float32, device=device)
