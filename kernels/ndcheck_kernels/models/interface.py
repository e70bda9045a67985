"""What the models' parts share: the refusal outside of a scope, a rank's part of a parameter."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ndcheck_kernels.ops.library import NAME
from ndcheck_kernels.scope.state import active_scope


def require_scope(kind: str, stock: str) -> None:
    """Raises RuntimeError outside a scope, naming transformers' setting and its stock value."""
    if active_scope() is None:
        raise RuntimeError(
            f"{kind}_implementation='{NAME}' only runs inside ndcheck_kernels.invariant_kernels(); "
            f"for stock kernels call model.set_{kind}_implementation('{stock}')"
        )


def is_seen_by_the_mode_alone() -> bool:
    """Whether ops go through the scope's dispatch mode and no other, which wants to see them."""
    return active_scope() is not None and len(_get_current_dispatch_mode_stack()) == 1


def past_the_mode() -> AbstractContextManager[object]:
    """For ops that the mode would pass to torch, all of them: inside of it, it does not judge them.

    Where another mode wants to see the ops, or there is none, nothing changes.
    """
    return torch._C._DisableTorchDispatch() if is_seen_by_the_mode_alone() else nullcontext()


def is_of_transformers(module: torch.nn.Module) -> bool:
    """Whether its class's name says what it computes: a model's own code has others of the name."""
    return type(module).__module__.startswith("transformers.models.")


def is_as_published(module: torch.nn.Module) -> bool:
    """Whether it and all modules in it are transformers' or torch's own, without hooks."""
    return not any(
        not type(each).__module__.startswith(("transformers.", "torch.", "ndcheck_kernels."))
        or each._forward_hooks
        or each._forward_pre_hooks
        for each in module.modules()
    )


def has_own_parts(layer: Any) -> bool:
    """Whether the parts of a decoder layer of the Llama shape are classes of its own file.

    Others in their place compute something else, whoever's they are, or nothing (a pruned layer).
    """
    own, norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm)
    of_heads = [getattr(own, name) for name in ("q_norm", "k_norm") if hasattr(own, name)]
    parts = (own, layer.mlp, *norms, *of_heads)
    return all(type(part).__module__ == type(layer).__module__ for part in parts)


def here(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard."""
    to_local = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()
