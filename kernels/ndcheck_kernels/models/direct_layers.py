"""Decoder layers of the Llama shape without a dispatch per op, for the invariant arm on a CPU.

A transformers decoder layer is some ninety ops, and the mode judges each of them, which on a small
model takes longer than the arithmetic. Here a layer calls the implementations that the mode would
have chosen, and torch itself for what is exact, in the layer's own order: so in its own bits, which
are compared before a model's layers are replaced.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from ndcheck_kernels.cpu.reductions import sum_rows
from ndcheck_kernels.models.attention import Spans
from ndcheck_kernels.models.caches.argument import cache_argument, given_cache
from ndcheck_kernels.ops.attention import attention_op
from ndcheck_kernels.scope import registry
from ndcheck_kernels.scope.mode import invariant_kernels
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.state import Scope, active_scope

aten = torch.ops.aten

Call = Callable[..., torch.Tensor]

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")

_is_proven: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


@contextmanager
def direct_layers(model: Any) -> Iterator[int]:
    """Run the model's decoder layers directly; yields how many, 0 where it has others than these.

    Inside `invariant_model`. Warns, and leaves the layers as they are, where they compute other
    bits than transformers' own.
    """
    layers = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    kinds = {tuple(map(type, layer.modules())) for layer in layers}
    if len(kinds) > 1 or not all(map(_fits, layers)):
        layers = []  # One layer stands for all when bits are compared.
    if layers and model not in _is_proven:
        _is_proven[model] = _has_own_bits(model, layers[0])
        if not _is_proven[model]:
            warnings.warn(
                f"{type(layers[0]).__name__} runs op by op, which is slower: what replaces it "
                "computes other bits",
                stacklevel=3,
            )
    layers = layers if _is_proven.get(model) else []
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward  # The class's own shows again.


def _fits(layer: Any) -> bool:
    if type(layer).__name__ not in LAYERS:
        return False
    own, mlp = layer.self_attn, layer.mlp
    products = [own.q_proj, own.k_proj, own.v_proj, own.o_proj]
    products += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        all(type(p) is torch.nn.Linear and type(p.weight.data) is torch.Tensor for p in products)
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and not any(
            "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks
            for m in layer.modules()
        )
    )


@torch.inference_mode()
def _has_own_bits(model: Any, layer: Any) -> bool:
    """Whether two tokens of two rows get the bits that transformers' own code gives them."""
    from transformers import StaticCache

    own, weight = layer.self_attn, layer.input_layernorm.weight
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(weight.dtype)

    steps = [
        (draw(2, 1, weight.numel()), (draw(2, 1, own.head_dim), draw(2, 1, own.head_dim)))
        for _ in range(2)
    ]
    found, name = [], cache_argument(type(layer).forward)
    for forward in (layer.forward, partial(_forward, layer)):
        cache = StaticCache(config=model.config, max_cache_len=2)
        with invariant_kernels():
            for end, (hidden, angles) in enumerate(steps, 1):
                spans = torch.tensor([[[[0, end]]], [[[end - 1, end]]]], dtype=torch.int32)
                found.append(
                    forward(
                        hidden,
                        attention_mask=spans.as_subclass(Spans),
                        position_embeddings=angles,
                        **{name: cache},
                    )
                )
    return torch.equal(torch.cat(found[:2]), torch.cat(found[2:]))


def _forward(
    layer: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **others: Any,
) -> torch.Tensor:
    scope, cache = active_scope(), given_cache(others)
    # Another mode wants to see the ops.
    is_alone = len(_get_current_dispatch_mode_stack()) == 1
    if (
        scope is not None
        and is_alone
        and isinstance(attention_mask, Spans)
        and position_embeddings is not None
        and cache is not None
    ):
        try:
            with _disable_current_modes():
                return _direct(
                    scope,
                    layer,
                    hidden_states,
                    attention_mask.plain()[:, 0],
                    position_embeddings,
                    cache,
                )
        except UnsupportedCallError:
            pass  # Met again below, where the mode refuses it by name.
    result: torch.Tensor = type(layer).forward(
        layer,
        hidden_states,
        attention_mask=attention_mask,
        position_embeddings=position_embeddings,
        **others,
    )
    return result


def _direct(
    scope: Scope,
    layer: Any,
    hidden: torch.Tensor,
    spans: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    cache: Any,
) -> torch.Tensor:
    """hidden [B, L, N]; spans as `ops.attention` takes them; angles (cos, sin), each [B, L, D]."""
    own, mlp = layer.self_attn, layer.mlp
    call = partial(_call, scope)
    rows = _norm(scope, hidden, layer.input_layernorm)
    by_head = (*hidden.shape[:-1], -1, own.head_dim)
    query, key, value = (
        _linear(call, rows, p).view(by_head) for p in (own.q_proj, own.k_proj, own.v_proj)
    )
    if hasattr(own, "q_norm"):
        query, key = _norm(scope, query, own.q_norm), _norm(scope, key, own.k_norm)
    cos, sin = (angle[:, None] for angle in angles)
    query, key = (_rotate(x.transpose(1, 2), cos, sin) for x in (query, key))
    keys, values = cache.update(key, value.transpose(1, 2), own.layer_idx)
    out = call(attention_op, query, keys, values, spans, own.scaling)
    out = out.transpose(1, 2).reshape(*hidden.shape[:-1], -1)
    hidden = hidden + _linear(call, out, own.o_proj)
    rows = _norm(scope, hidden, layer.post_attention_layernorm)
    gate = call(aten.silu.default, _linear(call, rows, mlp.gate_proj))
    return hidden + _linear(call, gate * _linear(call, rows, mlp.up_proj), mlp.down_proj)


def _linear(call: Call, x: torch.Tensor, module: torch.nn.Linear) -> torch.Tensor:
    return call(aten.linear.default, x, module.weight, module.bias)


def _norm(scope: Scope, x: torch.Tensor, module: Any) -> torch.Tensor:
    scope.fires["mean"] += 1
    scope.fires["rsqrt"] += 1
    rows = x.float().reshape(-1, x.shape[-1])
    variance = sum_rows(rows * rows).div_(rows.shape[-1])
    rows = rows * variance.add_(module.variance_epsilon).sqrt_().reciprocal_()
    result: torch.Tensor = module.weight * rows.to(x.dtype).view(x.shape)
    return result


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _call(scope: Scope, op: OpOverload, *args: Any) -> torch.Tensor:
    """What the mode does with a call that torch must not compute."""
    implementation, name = registry.resolved.get((op._op, "cpu")) or registry.find(op, "cpu")
    if implementation is None:
        raise UnsupportedCallError("nothing is registered for it")
    scope.fires[name] += 1
    result: torch.Tensor = implementation(*args)
    return result


__all__ = ["LAYERS", "direct_layers"]
