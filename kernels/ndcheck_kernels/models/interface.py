"""Refuse the attention and experts that transformers calls `NAME` outside of a scope."""

from ndcheck_kernels.ops.library import NAME
from ndcheck_kernels.scope.state import active_scope


def require_scope(kind: str, stock: str) -> None:
    """Raises RuntimeError outside a scope, naming transformers' setting and its stock value."""
    if active_scope() is None:
        raise RuntimeError(
            f"{kind}_implementation='{NAME}' only runs inside ndcheck_kernels.invariant_kernels(); "
            f"for stock kernels call model.set_{kind}_implementation('{stock}')"
        )
