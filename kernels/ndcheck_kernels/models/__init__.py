"""What the scope needs of a transformers model beside its ops: its attention, experts, recurrences.

A dispatch mode sees single ops. Where a model's own algorithm depends on the batch (a softmax over
padded keys, chunks counted from a padded column), every op may be invariant and the result is not.
`invariant_model` puts the invariant algorithms in their place, or refuses the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ndcheck_kernels.models import (
    attention,
    experts,
    gated_delta,
    own_attention,
    quantised,
    state_space,
    tensor_parallel,
)
from ndcheck_kernels.models.rows import rotary
from ndcheck_kernels.ops.attention import is_capturing
from ndcheck_kernels.ops.library import NAME
from ndcheck_kernels.scope.refusal import UncoveredOpError

# Layers that keep keys and values of earlier tokens, or nothing.
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"})
_STATES = (gated_delta, state_space)


@contextmanager
def invariant_model(model: Any, groups: int | None = None) -> Iterator[None]:
    """Let a transformers model use the invariant attention, experts and recurrences.

    A model that is spread over ranks also adds their partial sums in one order; with ``groups`` its
    bits are those of any number of ranks that divides it: see `tensor_parallel`. On leaving, it has
    its own again. Raises UncoveredOpError for quantised weights but FP8 in blocks (`quantised`),
    for attention that cannot be replaced, for layers with another kind of state, and for those that
    cannot be spread so.
    """
    _refuse_quantised(model)
    _refuse_states(model)
    _refuse_own_attention(model)
    attention.register_attention()
    experts.register_experts()
    own_attention.replace_attention(model)
    gated_delta.replace_recurrences(model)
    state_space.replace_mixers(model)
    rotary.replace_rotary(model)
    own = model.config._attn_implementation, model.config._experts_implementation
    try:
        _set(model, NAME, NAME)
        with (
            _steady_frequencies(model),
            quantised.invariant_fp8_layers(model),
            tensor_parallel.ordered_layers(model, groups),
        ):
            yield
    finally:
        _set(model, *own)


def _set(model: Any, attention: str, expert: str) -> None:
    if model._can_set_attn_implementation():
        model.set_attn_implementation(attention)
    model.set_experts_implementation(expert)


def _refuse_quantised(model: Any) -> None:
    for path, module in model.named_modules():
        if (refused := quantised.refused_weight(module)) is not None:
            name, dtype, reason = refused
            op = "product with quantised weights"
            raise _refusal(model, op, path, dtype, f"{name}: {reason}")


def _refuse_states(model: Any) -> None:
    """Only layers whose state has an invariant implementation, or none but keys and values."""
    for index, layer_type in enumerate(getattr(model.config, "layer_types", None) or ()):
        if layer_type in _LAYER_TYPES:
            continue
        layers = [
            (path, module)
            for path, module in model.named_modules()
            if getattr(module, "layer_idx", None) == index
        ]
        if any(covers.is_covered(module) for _, module in layers for covers in _STATES):
            continue
        path = layers[-1][0] if layers else ""
        reason = "its chunks would depend on padding, and prefill and decode would differ"
        raise _refusal(model, layer_type.replace("_", " "), path, model.dtype, reason)


def _refuse_own_attention(model: Any) -> None:
    if model._can_set_attn_implementation():
        return
    for path, module in model.named_modules():
        if "Attention" in type(module).__name__ and not own_attention.is_covered(module):
            reason = "the module computes it by itself, over padded keys, and takes no other"
            raise _refusal(model, "attention", path, model.dtype, reason)


@contextmanager
def _steady_frequencies(model: Any) -> Iterator[None]:
    """Refuse passes whose longest row would choose the rotary frequencies of all rows."""
    hooks = []
    for path, module in model.named_modules():
        limit = _most_positions(module)
        if limit is None:
            continue

        def check(
            module: Any, args: Any, kwargs: Any, path: str = path, limit: int = limit
        ) -> None:
            positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
            if not is_capturing() and int(positions.max()) >= limit:
                reason = f"beyond {limit} positions they follow the longest row of the batch"
                raise _refusal(model, "rotary frequencies", path, model.dtype, reason)

        hooks.append(module.register_forward_pre_hook(check, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _most_positions(module: Any) -> int | None:
    """So many positions have the same frequencies in every batch; None: all of them."""
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
    if not hasattr(module, "rope_type") or not parameters:
        return None
    by_layer_type = [parameters] if "rope_type" in parameters else filter(None, parameters.values())
    limits = []
    for chosen in by_layer_type:
        if chosen["rope_type"] == "longrope":
            limits.append(chosen["original_max_position_embeddings"])
        elif "dynamic" in chosen["rope_type"]:
            # At its last position frequencies that have grown for other rows are kept.
            limits.append(module.original_max_seq_len - 1)
    return min(limits, default=None)


def _refusal(model: Any, op: str, path: str, dtype: torch.dtype, reason: str) -> UncoveredOpError:
    module = f"{path or 'the root module'} ({type(model.get_submodule(path)).__name__})"
    return UncoveredOpError(op, dtype, model.device.type, module, reason)
