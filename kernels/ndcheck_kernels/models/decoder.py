"""Decoder layers of the Llama shape as ten launches each, for the invariant arm on CUDA.

With a mixture of experts in the MLP's place, twelve (`mixture`). With FP8 weights in blocks many
rows need one more, which quantises what attention gives, and with other FP8 weights all do.

A transformers decoder layer is some sixty small kernels, most of them elementwise. Here q, k and v
are one product, as are gate and up; norms, QK norm with rotary and cache write, and silu * up are
one launch each; residuals are added where the product before them is rounded. Every launch keeps
its own contract, so the layer is batch-invariant as they are. Its bits differ from the unfused
layer's, which rounds more often.

On ranks (`tensor_parallel`) a layer's two sums over all ranks take a collective and a launch more
each, which a CUDA graph captures as well. With groups, a plain layer's products are those of blocks
of one width, so that its bits are the same however many ranks there are; a mixture of experts or
FP8 weights then run unfused.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ndcheck_kernels.cuda.attention.causal import attention, quantised_attention
from ndcheck_kernels.cuda.attention.qkv import HEAD_DIMS, qkv
from ndcheck_kernels.cuda.compiler import compile_failure, quiet_compiler
from ndcheck_kernels.cuda.device import FLOATS
from ndcheck_kernels.cuda.rows.quantise import (
    quantise_rows,
    rms_norm_quantise,
    silu_mul_quantise,
)
from ndcheck_kernels.cuda.rows.rms_norm import rms_norm
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul
from ndcheck_kernels.models.caches.argument import given_cache
from ndcheck_kernels.models.interface import has_own_parts, here, is_as_published
from ndcheck_kernels.models.mixture import is_mixture, mixture, mixture_fires, mixture_part
from ndcheck_kernels.models.projections import Projection, add_over_ranks, can_join
from ndcheck_kernels.models.quantised import is_fp8
from ndcheck_kernels.models.rows.norms import composed_norms
from ndcheck_kernels.models.tensor_parallel import REPLICATED, Spread, is_shared, spread_of, styles
from ndcheck_kernels.models.weight_only import WeightOnlyLinear
from ndcheck_kernels.scope.refusal import refusal
from ndcheck_kernels.scope.state import Scope, active_scope

LAYERS = (
    *("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"),
    "Qwen3MoeDecoderLayer",
)

# What one layer computes but for its products and its MLP, as `Scope.fires` counts it.
_FIRES = {"attention": 1, "rms_norm": 2, "qkv": 1}


@contextmanager
def fused_layers(model: torch.nn.Module) -> Iterator[int]:
    """Run the model's decoder layers fused; yields how many, 0 where it has others than these.

    Norms outside of such layers become one launch each, in their own bits (`norms`). Warns, and
    leaves the layers as they are, where a kernel that only fused layers need does not compile.
    """
    layers, spread = join_weights(model), spread_of(model)
    if spread is not None and not _can_spread(model, layers, spread):
        layers = []
    reason = next(filter(None, map(_compile_failure, layers)), None)
    if reason is not None:
        warnings.warn(f"decoder layers run unfused, which is slower: {reason}", stacklevel=3)
        layers = []
    for i, layer in enumerate(layers):
        layer.forward = partial(_forward, layer, i == len(layers) - 1, spread)
    try:
        with composed_norms(model):
            yield len(layers)
    finally:
        for layer in layers:
            del layer.forward  # The class's own shows again.


_compile_failures: dict[Hashable, str | None] = {}


def _compile_failure(layer: Any) -> str | None:
    """Why a kernel of the fused layer cannot be compiled; each shape is tried once."""
    own, norm = layer.self_attn, layer.input_layernorm.weight
    heads, kv_heads = (_n_heads(p, own.head_dim) for p in (own.q_proj, own.k_proj))
    norm, q_norm = here(norm), getattr(own, "q_norm", None)
    output = layer._output
    shape = (
        *(norm.device, norm.dtype, norm.numel(), heads, kv_heads, own.head_dim),
        *(q_norm is None, output.op),
    )
    if shape not in _compile_failures:
        _compile_failures[shape] = None
        cache = norm.new_zeros(1, kv_heads, 1, own.head_dim)
        angles = norm.new_zeros(1, 1, own.head_dim)
        weight = None if q_norm is None else here(q_norm.weight)
        try:
            with quiet_compiler(), _disable_current_modes():
                rms_norm(norm[None], norm)
                silu_mul(norm[None], norm[None])
                if output.scales is not None:
                    quantise_rows(norm[None], one_scale=output.one_scale)
                    silu_mul_quantise(norm[None], norm[None], one_scale=output.one_scale)
                    rms_norm_quantise(norm[None], norm, 0.0, one_scale=output.one_scale)
                qkv(
                    norm.new_zeros(1, 1, (heads + 2 * kv_heads) * own.head_dim), angles, angles,
                    cache, cache.clone(), torch.zeros((), dtype=torch.int64, device=norm.device),
                    q_weight=weight, k_weight=weight,
                )  # fmt: skip
        except Exception as error:
            _compile_failures[shape] = compile_failure(error)
            if _compile_failures[shape] is None:
                raise
    return _compile_failures[shape]


def join_weights(model: torch.nn.Module) -> list[Any]:
    """Lay weights that meet the same rows out as one; returns the layers that can be fused.

    The parts stay views of the joined weight. A CUDA graph captured before this one holds their old
    place, so join them before the first capture.
    """
    layers: list[Any] = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    if not all(map(_fits, layers)):
        return []
    if not (_is_cut_as_here(model, layers) if is_shared(model) else _have_class_forwards(layers)):
        return []
    for layer in layers:
        if not hasattr(layer, "_joined_qkv"):
            own, mlp = layer.self_attn, layer.mlp
            layer._joined_qkv = Projection.of(own.q_proj, own.k_proj, own.v_proj)
            layer._output = Projection.of(own.o_proj)
            if not is_mixture(mlp):
                layer._joined_gate_up = Projection.of(mlp.gate_proj, mlp.up_proj)
                layer._down = Projection.of(mlp.down_proj)
    return layers


def _have_class_forwards(layers: list[Any]) -> bool:
    """Whether no module has a forward of its own, but FP8 layers: these are replaced."""
    return not any(
        "forward" in vars(module) and not is_fp8(module)
        for layer in layers
        for module in layer.modules()
    )


def _fits(layer: Any) -> bool:
    if type(layer).__name__ not in LAYERS or not (is_as_published(layer) and has_own_parts(layer)):
        return False
    own, mlp = layer.self_attn, layer.mlp
    return (
        # Mistral's attention reads its window from the config.
        getattr(own, "sliding_window", getattr(own.config, "sliding_window", None)) is None
        and own.o_proj.bias is None
        and can_join(own.q_proj, own.k_proj, own.v_proj)
        and (is_mixture(mlp) or _is_gated(mlp))
        and own.head_dim in HEAD_DIMS
        and layer.input_layernorm.weight.dtype in FLOATS
        and all(_is_covered(p) for p in (own.q_proj, own.o_proj))
    )


def _is_cut_as_here(model: torch.nn.Module, layers: list[Any]) -> bool:
    """Whether the model's plan cuts what a fused layer takes as cut, and nothing else."""
    style_of = styles(model)
    for layer in layers:
        own, mlp = layer.self_attn, layer.mlp
        wanted = dict.fromkeys((own.q_proj, own.k_proj, own.v_proj), "colwise")
        wanted[own.o_proj] = "rowwise"
        if is_mixture(mlp):
            wanted[mlp.experts] = "moe_tp_experts"
        else:
            wanted |= {mlp.gate_proj: "colwise", mlp.up_proj: "colwise", mlp.down_proj: "rowwise"}
        for module in layer.modules():
            found = style_of.get(module)
            if found != wanted.get(module) and (module in wanted or found not in REPLICATED):
                return False
    return True


def _can_spread(model: torch.nn.Module, layers: list[Any], spread: Spread) -> bool:
    """Whether the fused layers can be spread so: the same answer however many ranks there are."""
    is_plain = all(layer._output.op == "linear" and not is_mixture(layer.mlp) for layer in layers)
    return (is_plain or not spread.is_nested) and _is_cut_as_here(model, layers)


def _is_covered(projection: Any) -> bool:
    is_quantised = is_fp8(projection) or isinstance(projection, WeightOnlyLinear)
    return is_quantised or projection.weight.dtype in FLOATS


def _is_gated(mlp: Any) -> bool:
    return hasattr(mlp, "gate_proj") and (
        type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and all(p.bias is None for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        and can_join(mlp.gate_proj, mlp.up_proj)
        and all(_is_covered(p) for p in (mlp.gate_proj, mlp.down_proj))
    )


def _forward(
    layer: Any,
    is_last: bool,
    spread: Spread | None,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **others: Any,
) -> torch.Tensor:
    scope = active_scope()
    if scope is None:
        raise RuntimeError("fused layers run inside invariant_kernels() only")
    spans = attention_mask.as_subclass(torch.Tensor)
    if spans.shape[-1] != 2:
        raise refusal(
            "attention",
            hidden_states.dtype,
            hidden_states.device.type,
            "fused layers see every key up to their own position, and this mask hides some",
        )
    with _disable_current_modes():
        return _fused(
            layer,
            is_last,
            spread,
            hidden_states,
            spans,
            position_embeddings,
            given_cache(others),
            scope,
        )


def _fused(
    layer: Any,
    is_last: bool,
    spread: Spread | None,
    hidden: torch.Tensor,
    spans: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    cache: Any,
    scope: Scope,
) -> torch.Tensor:
    """hidden [B, L, N]; spans [B, 1, 1, 2] as `ops.attention` makes them."""
    own, mlp = layer.self_attn, layer.mlp
    batch, length, width = hidden.shape
    residual = hidden.reshape(-1, width)
    block = _block_width(spread, own.q_proj, own.k_proj, own.v_proj)
    x = layer._joined_qkv.after_norm(residual, layer.input_layernorm, block)
    x = x.view(batch, length, -1)
    keys, values, offset = _columns(cache, own, x)
    q_norm, k_norm = getattr(own, "q_norm", None), getattr(own, "k_norm", None)
    query = qkv(
        x, *position_embeddings, keys, values, offset,
        q_weight=None if q_norm is None else here(q_norm.weight),
        k_weight=None if k_norm is None else here(k_norm.weight),
        eps=0.0 if q_norm is None else q_norm.variance_epsilon,
    )  # fmt: skip
    seen = {"starts": spans[:, 0, 0, 0], "lengths": spans[:, 0, 0, 1], "scale": own.scaling}
    if spread is None and layer._output.op == "block_fp8_linear":
        codes = quantised_attention(query, keys, values, **seen)
        residual = layer._output.of_codes(codes, residual.dtype, residual)
    else:
        out = attention(query, keys, values, **seen)
        out = out.transpose(1, 2).reshape(batch * length, -1)
        if spread is None:
            residual = layer._output(out, residual)
        else:
            residual = add_over_ranks(layer._output.parts(out, spread.n_parts), residual, spread)
    norm = layer.post_attention_layernorm
    if is_mixture(mlp):
        rows = rms_norm(residual, here(norm.weight), norm.variance_epsilon)
        if spread is None:
            residual = mixture(rows, mlp, residual)
        else:
            residual = add_over_ranks(mixture_part(rows, mlp)[None], residual, spread)
        scope.fires.update(mixture_fires(mlp, is_part=spread is not None))
    else:
        block = _block_width(spread, mlp.gate_proj, mlp.up_proj)
        gate_up = layer._joined_gate_up.after_norm(residual, norm, block)
        if spread is None:
            residual = layer._down.after_gate(gate_up, residual)
        else:
            parts = layer._down.parts_after_gate(gate_up, spread.n_parts)
            residual = add_over_ranks(parts, residual, spread)
        scope.fires.update([layer._joined_gate_up.op, _name(layer._down, spread), "silu_mul"])
    if is_last:
        # Together: one launch, where the cache would make one a layer.
        torch._foreach_add_([c.cumulative_length for c in cache.layers], length)
    scope.fires.update(_FIRES)
    scope.fires.update([layer._joined_qkv.op, _name(layer._output, spread)])
    if spread is not None and spread.n_ranks > 1:
        scope.fires["rank_sum"] += 2
    return residual.view(batch, length, width)


def _block_width(spread: Spread | None, *layers: Any) -> int | None:
    """How wide one of the blocks is into which groups cut what these layers give together."""
    if spread is None or not spread.is_nested:
        return None
    width: int = sum(layer.out_features for layer in layers) // spread.groups
    return width


def _name(projection: Projection, spread: Spread | None) -> str:
    return projection.op if spread is None else f"partial_{projection.op}"


def _n_heads(projection: Any, head_dim: int) -> int:
    """Of this rank."""
    mesh = getattr(getattr(projection, "weight", None), "device_mesh", None)
    n_ranks = 1 if mesh is None else mesh.size()
    return int(projection.out_features) // n_ranks // head_dim


def _columns(
    cache: Any, own: Any, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The layer's static cache, and how many of its columns are filled."""
    layer = cache.layers[own.layer_idx]
    if not hasattr(layer, "cumulative_length"):
        raise TypeError("fused layers write to transformers' StaticCache only")
    if not layer.is_initialized:
        kv_heads = _n_heads(own.k_proj, own.head_dim)
        like = x.new_empty(x.shape[0], kv_heads, 1, own.head_dim)
        layer.lazy_initialization(like, like)
    return layer.keys, layer.values, layer.cumulative_length


__all__ = ["LAYERS", "fused_layers", "join_weights"]
