"""Decoder layers of the Llama shape without a dispatch per op, for the invariant arm on a CPU.

A transformers decoder layer is some ninety ops, and the mode judges each of them, which on a small
model takes longer than the arithmetic. Here a layer calls the implementations that the mode would
have chosen, and torch itself for what is exact, in the layer's own order: so in its own bits, which
are compared before a model's layers are replaced. What elements or rows of queries and keys go
through alike is called once for both, and the norm behind the layers is theirs.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ndcheck_kernels.cpu.attention import Grid, attention, make_grid
from ndcheck_kernels.cpu.pointwise import pointwise
from ndcheck_kernels.cpu.products import addmm, mm
from ndcheck_kernels.cpu.reductions import sum_rows
from ndcheck_kernels.models.attention import Spans
from ndcheck_kernels.models.caches.argument import cache_argument, given_cache
from ndcheck_kernels.models.interface import (
    has_own_parts,
    is_as_published,
    is_seen_by_the_mode_alone,
)
from ndcheck_kernels.scope.mode import invariant_kernels
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.state import Scope, active_scope

aten = torch.ops.aten

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
    grids = _Grids()
    replaced = {layer: partial(_forward, _Parts.of(layer), grids, layer) for layer in layers}
    for norm in _other_norms(model, layers):
        replaced[norm] = partial(_normalise, norm)
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield len(layers)
    finally:
        for module in replaced:
            del module.forward  # The class's own shows again.


def _fits(layer: Any) -> bool:
    if type(layer).__name__ not in LAYERS or _is_changed(layer) or not has_own_parts(layer):
        return False
    own, products = layer.self_attn, _products(layer)
    return (
        all(type(p) is torch.nn.Linear and type(p.weight.data) is torch.Tensor for p in products)
        and type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and (
            not hasattr(own, "q_norm") or own.q_norm.variance_epsilon == own.k_norm.variance_epsilon
        )
    )


def _products(layer: Any) -> tuple[Any, ...]:
    own, mlp = layer.self_attn, layer.mlp
    of_attention = own.q_proj, own.k_proj, own.v_proj, own.o_proj
    return *of_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _is_changed(module: Any) -> bool:
    return not is_as_published(module) or any("forward" in vars(m) for m in module.modules())


def _other_norms(model: Any, layers: list[Any]) -> list[Any]:
    """Those of the layers' kind that are in none of them: of a decoder the last one."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    kinds = {type(layer.input_layernorm) for layer in layers}
    return [
        module
        for module in model.modules()
        if type(module) in kinds and id(module) not in inside and not _is_changed(module)
    ]


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
    for forward in (layer.forward, partial(_forward, _Parts.of(layer), _Grids(), layer)):
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


Linear = tuple[torch.Tensor, torch.Tensor | None]
"""A weight [K, N] and its bias [N]."""
Norm = tuple[torch.Tensor, float]
"""A weight, whose last dim is normalised, and epsilon."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """A layer's parameters: a module looks each of them up by name, in Python.

    ``head_norm`` is that of queries and keys, [H + H_kv, D], where there is one.
    """

    attention: Any
    first_norm: Norm
    query: Linear
    key: Linear
    value: Linear
    head_norm: Norm | None
    out: Linear
    second_norm: Norm
    gate: Linear
    up: Linear
    down: Linear

    @classmethod
    def of(cls, layer: Any) -> _Parts:
        own = layer.self_attn
        query, key, value, out, gate, up, down = ((p.weight.t(), p.bias) for p in _products(layer))
        head_norm = None
        if hasattr(own, "q_norm"):
            weights = [
                norm.weight.expand(weight.shape[1] // own.head_dim, own.head_dim)
                for norm, (weight, _) in ((own.q_norm, query), (own.k_norm, key))
            ]
            head_norm = torch.cat(weights), own.q_norm.variance_epsilon
        first_norm, second_norm = map(
            _norm_parts, (layer.input_layernorm, layer.post_attention_layernorm)
        )
        return cls(
            *(own, first_norm, query, key, value, head_norm),
            *(out, second_norm, gate, up, down),
        )


def _norm_parts(module: Any) -> Norm:
    return module.weight, module.variance_epsilon


class _Grids:
    """The grid of the last spans: all layers of a pass have the same ones."""

    def __init__(self) -> None:
        self._spans: Spans | None = None

    def of(self, spans: Spans, queries: int) -> tuple[torch.Tensor, Grid]:
        if spans is not self._spans:
            plain = spans.plain()[:, 0]
            self._found, self._spans = (plain, make_grid(plain, queries)), spans
        return self._found


def _forward(
    parts: _Parts,
    grids: _Grids,
    layer: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **others: Any,
) -> torch.Tensor:
    scope, cache = active_scope(), given_cache(others)
    if (
        scope is not None
        and is_seen_by_the_mode_alone()
        and isinstance(attention_mask, Spans)
        and position_embeddings is not None
        and cache is not None
    ):
        try:
            with torch._C._DisableTorchDispatch():
                spans, grid = grids.of(attention_mask, hidden_states.shape[1])
                return _direct(scope, parts, hidden_states, spans, grid, position_embeddings, cache)
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


def _normalise(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    scope = active_scope()
    if scope is None or not is_seen_by_the_mode_alone():
        result: torch.Tensor = type(module).forward(module, hidden_states)
        return result
    with torch._C._DisableTorchDispatch():
        return _norm(scope, hidden_states, _norm_parts(module))


def _direct(
    scope: Scope,
    parts: _Parts,
    hidden: torch.Tensor,
    spans: torch.Tensor,
    grid: Grid,
    angles: tuple[torch.Tensor, torch.Tensor],
    cache: Any,
) -> torch.Tensor:
    """hidden [B, L, N]; spans as `ops.attention` takes them; angles (cos, sin), each [B, L, D]."""
    own, shape = parts.attention, hidden.shape
    by_head = (*shape[:-1], -1, own.head_dim)
    hidden = hidden.reshape(-1, shape[-1])
    rows = _norm(scope, hidden, parts.first_norm)
    query, key, value = (_linear(scope, rows, p) for p in (parts.query, parts.key, parts.value))
    # Elements and rows of both at once: no result depends on those beside it.
    both = torch.cat((query, key), -1).view(by_head)
    if parts.head_norm is not None:
        both = _norm(scope, both, parts.head_norm, 2)
    cos, sin = (angle[:, None] for angle in angles)
    both = _rotate(both.transpose(1, 2), cos, sin)
    n_heads = query.shape[-1] // own.head_dim
    keys, values = cache.update(
        both[:, n_heads:], value.view(by_head).transpose(1, 2), own.layer_idx
    )
    scope.fires["attention"] += 1
    out = attention(both[:, :n_heads], keys, values, spans, own.scaling, grid=grid)
    out = out.transpose(1, 2).reshape(len(hidden), -1)
    hidden = hidden + _linear(scope, out, parts.out)
    rows = _norm(scope, hidden, parts.second_norm)
    scope.fires["silu"] += 1
    gate = pointwise(aten.silu.default, _linear(scope, rows, parts.gate))
    hidden = hidden + _linear(scope, gate * _linear(scope, rows, parts.up), parts.down)
    return hidden.view(shape)


def _linear(scope: Scope, rows: torch.Tensor, part: Linear) -> torch.Tensor:
    """[M, K] to [M, N]."""
    scope.fires["linear"] += 1
    weight, bias = part
    return mm(rows, weight) if bias is None else addmm(bias, rows, weight)


def _norm(scope: Scope, x: torch.Tensor, part: Norm, n_modules: int = 1) -> torch.Tensor:
    """Over the last dim."""
    scope.fires["mean"] += n_modules
    scope.fires["rsqrt"] += n_modules
    weight, epsilon = part
    rows = x.float().reshape(-1, x.shape[-1])
    variance = sum_rows(rows * rows).div_(rows.shape[-1])
    rows = rows * variance.add_(epsilon).sqrt_().reciprocal_()
    return weight * rows.to(x.dtype).view(x.shape)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


__all__ = ["LAYERS", "direct_layers"]
