"""The ops that cannot make one row depend on another, on any device, in any order of evaluation.

They move or draw data without arithmetic, or compute every element by one correctly rounded
operation of its own inputs (IEEE 754 fixes the result of +, -, *, / and square root, so a vector
lane, a scalar loop tail and a GPU thread agree), or they only compare, select or round.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

_MOVES = """
cat stack hstack vstack clone contiguous copy copy_ _to_copy lift type_as empty empty_like
empty_strided empty_permuted zeros zeros_like ones ones_like full full_like new_empty
new_empty_strided new_zeros new_ones new_full arange linspace scalar_tensor eye tril_indices
triu_indices fill fill_ fill_diagonal_ zero_ embedding index index_select gather take
take_along_dim index_copy index_copy_ masked_scatter masked_scatter_ masked_select index_fill
index_fill_ slice_scatter select_scatter diagonal_scatter as_strided_scatter constant_pad_nd pad
repeat repeat_interleave roll flip rot90 tril tril_ triu triu_ diag_embed block_diag nonzero
nonzero_static count_nonzero one_hot unsafe_split _unsafe_view _reshape_alias _unsafe_index
_local_scalar_dense item is_nonzero equal allclose isclose isin searchsorted bucketize rand
rand_like randint randint_like randn randn_like uniform_ exponential_ normal normal_ bernoulli
bernoulli_ random_ randperm _assert_async _assert_scalar sym_size sym_numel sym_stride size numel
dim is_same_size complex
"""

# Not `pow`, `exp`, `rsqrt`, ...: libm, vector libraries and their loop tails round differently.
# Nor `maximum` and `clamp` by a tensor: of 0 and -0 vector lanes and scalar loops take another one.
_ROUNDS_ONCE = """
abs neg add sub rsub mul div true_divide reciprocal sqrt relu relu6 clamp clamp_min clamp_max clip
floor ceil trunc sign sgn signbit where masked_fill positive copysign isnan isinf isfinite isposinf
isneginf eq ne lt le gt ge logical_and logical_or logical_xor logical_not bitwise_and bitwise_or
bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __iand__
__ior__ __ixor__ __lshift__ __rshift__ threshold hardtanh nan_to_num
"""

# Views that a tensor becomes itself, or of which a copy is made.
_VIEWS = frozenset({torch.Tag.inplace_view, torch.Tag.view_copy})
_EXACT = frozenset(_MOVES.split()) | {
    name + suffix for name in _ROUNDS_ONCE.split() for suffix in ("", "_")
}
# Of complex numbers these take several roundings, fused in some lanes and not in others.
_REAL_ONLY = frozenset(
    name + suffix
    for name in ("abs", "mul", "div", "true_divide", "reciprocal", "sqrt", "sgn")
    for suffix in ("", "_")
)
# add(x, y, alpha=a) is a * y + x: two roundings in a scalar loop, one in a vector lane (FMA).
_MAY_SCALE = frozenset({"add", "add_", "sub", "sub_", "rsub"})
_SCATTERS = frozenset({"scatter", "scatter_"})
_INDEX_PUTS = frozenset({"index_put", "index_put_", "_unsafe_index_put"})

_UNSEEN, _UNSCALED = object(), object()
# None: only of real numbers.
_known: dict[Callable[..., Any], Any] = {}


def is_exact(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether torch may compute this call itself, whatever the device."""
    # As in `registry.resolved`.
    known = _known.get(op._op, _UNSEEN)
    if known is _UNSEEN:
        known = _known[op._op] = _is_exact(op)
    if known is None:
        return not any(isinstance(a, complex) or _is_complex(a) for a in args)
    if not known:
        return _writes_once(op, args, kwargs)
    return known is not _UNSCALED or (len(args) < 3 and "alpha" not in kwargs)


def _is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_complex()


def _is_exact(op: OpOverload) -> Any:
    name = op._schema.name.removeprefix("aten::")
    # Quotients that are cut are rounded before that in a scalar loop, and not in a vector lane.
    if "_mode" in op._overloadname or (name.startswith("cl") and "Tensor" in op._overloadname):
        return False
    is_view = op.is_view or not _VIEWS.isdisjoint(op.tags)
    if op.namespace not in ("aten", "prim") or not (is_view or name in _EXACT):
        return False
    if name in _MAY_SCALE:
        return _UNSCALED
    return None if name in _REAL_ONLY else True


def _writes_once(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Scatters that overwrite; those that accumulate add in an order nobody promises."""
    name = op._schema.name.removeprefix("aten::")
    if name in _SCATTERS:
        return op._overloadname in ("src", "value")
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    return name in _INDEX_PUTS and not accumulate
