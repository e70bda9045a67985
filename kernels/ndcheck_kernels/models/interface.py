"""What the models' parts share: the refusal outside of a scope, a rank's part of a parameter."""

import torch

from ndcheck_kernels.ops.library import NAME
from ndcheck_kernels.scope.state import active_scope


def require_scope(kind: str, stock: str) -> None:
    """Raises RuntimeError outside a scope, naming transformers' setting and its stock value."""
    if active_scope() is None:
        raise RuntimeError(
            f"{kind}_implementation='{NAME}' only runs inside ndcheck_kernels.invariant_kernels(); "
            f"for stock kernels call model.set_{kind}_implementation('{stock}')"
        )


def here(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard."""
    to_local = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()
