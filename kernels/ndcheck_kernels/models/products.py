"""Which products a model computes, by the shapes of its weights."""

from __future__ import annotations

import torch

from ndcheck_kernels.models.decoder import join_weights


def product_shapes(model: torch.nn.Module) -> tuple[tuple[int, int], ...]:
    """(N, K) of each linear layer, in the model's order, each once.

    Where the invariant arm runs decoder layers fused, weights that meet the same rows count as the
    one that they are laid out as. Experts are not among them: grouped products keep the frozen
    tables, as those of FP8 weights do. The model may be on the meta device.
    """
    layers = join_weights(model)
    joined = [layer._joined_qkv.weight for layer in layers]
    joined += [
        layer._joined_gate_up.weight for layer in layers if hasattr(layer, "_joined_gate_up")
    ]
    parts = {
        id(projection)
        for layer in layers
        for projection in (
            *(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            *(getattr(layer.mlp, name, None) for name in ("gate_proj", "up_proj")),
        )
    }
    linear = [
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in parts
    ]
    plain = [w for w in (*joined, *linear) if w.dtype.itemsize > 1]
    return tuple(dict.fromkeys((len(w), w.shape[1]) for w in plain))
