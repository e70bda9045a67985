"""`torch.autograd.functional`, to which a result without a graph is one that nothing changes.

Below autograd no result has a graph, so that it would give zeros.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from ndcheck_kernels.scope.refusal import refusal
from ndcheck_kernels.scope.state import active_scope


def refuse_within_scopes() -> None:
    """Let all of its functions raise UncoveredOpError within a scope of their thread."""
    functional = torch.autograd.functional
    # The first that each of them calls.
    functional._grad_preprocess = _refusing(functional._grad_preprocess)


def _refusing(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(preprocess)
    def checked(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if active_scope() is not None:
            x = inputs[0]
            reason = "no gradients flow in here, and it would give zeros"
            raise refusal("torch.autograd.functional", x.dtype, x.device.type, reason)
        return preprocess(inputs, *args, **kwargs)

    return checked
