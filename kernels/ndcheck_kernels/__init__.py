"""Batch-invariant kernels: a result never depends on the batch around it."""

from ndcheck_kernels.models import invariant_model
from ndcheck_kernels.models.attention import register_attention
from ndcheck_kernels.scope.mode import invariant_kernels
from ndcheck_kernels.scope.refusal import UncoveredOpError, UnsupportedCallError
from ndcheck_kernels.scope.registry import (
    accept,
    accepted_ops,
    covered_ops,
    implements,
    implements_pointwise,
)
from ndcheck_kernels.scope.state import OP_GROUPS, Scope, active_scope

__all__ = [
    "OP_GROUPS",
    "Scope",
    "UncoveredOpError",
    "UnsupportedCallError",
    "accept",
    "accepted_ops",
    "active_scope",
    "covered_ops",
    "implements",
    "implements_pointwise",
    "invariant_kernels",
    "invariant_model",
    "register_attention",
]
