"""Attention as an op of its own, the spans that say who sees whom, and its transformers names.

`torch.ops.ndcheck_kernels.attention` has no kernel of its own: inside `invariant_kernels()` it goes
to the implementation registered for the device, and outside it fails. A query sees one contiguous
run of keys, so an int32 tensor of *spans* replaces the mask:

- [B, 1, 2], causal: (start, end). Query i of Q sees the keys in [start, end - (Q - 1 - i)).
- [B, Q, 3], any: (origin, begin, end). The query sees the keys in [begin, end).

Splits of the keys are counted from the row's own first token, at column `start` or `origin`, which
is negative if a sliding cache has dropped it. So padding shifts nothing.

`sinks` [H] is one more score per head, with no value: weights sum to less than 1. `slopes` [H] adds
slope * (column - the row's first column), rounded to the query's dtype, to the scores (ALiBi).
"""

from collections.abc import Callable
from typing import Any

import torch

from ndcheck_kernels.models.paged import paged_attention
from ndcheck_kernels.scope.mode import (
    UncoveredOpError,
    UnsupportedCallError,
    active_scope,
    implements,
    refusal,
)

NAME = "ndcheck_invariant"

_library = torch.library.Library("ndcheck_kernels", "DEF")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor spans, float scale, "
    "float softcap=0.0, Tensor? sinks=None, Tensor? slopes=None) -> Tensor"
)
attention_op = torch.ops.ndcheck_kernels.attention.default


# What a model may do with a mask that it only passes on.
_MOVES = """
__get__ size dim ndimension stride numel data_ptr element_size is_floating_point is_contiguous
contiguous clone detach to cuda cpu requires_grad_ __getitem__ expand expand_as repeat unsqueeze
squeeze view reshape index_select narrow select __repr__ __format__ __deepcopy__
"""


class Spans(torch.Tensor):
    """Spans in a mask's place: int32 [B, 1, 1, 2] or [B, 1, Q, 3], to be passed on as they are.

    A model that calculates with its mask would take them for scores: it is refused by name.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = args[0] if args else None
        if isinstance(own, Spans) and func.__name__ in _MOVES.split():
            result = super().__torch_function__(func, types, args, kwargs or {})
            if not isinstance(result, Spans) or (
                result.dtype == torch.int32 and result.shape[-1] == own.shape[-1]
            ):
                return result
        reason = f"the model calculates with its mask ({func.__name__}) instead of passing it on"
        where = own.device.type if isinstance(own, torch.Tensor) else "any device"
        raise refusal("attention", torch.int32, where, reason)

    def plain(self) -> torch.Tensor:
        """Without the guard."""
        return self.as_subclass(torch.Tensor)


def _refuse_outside_scope(*args: Any) -> torch.Tensor:
    raise RuntimeError(
        f"attn_implementation='{NAME}' only runs inside ndcheck_kernels.invariant_kernels(); "
        "for stock kernels call model.set_attn_implementation('sdpa')"
    )


_library.impl("attention", _refuse_outside_scope, "CompositeExplicitAutograd")


def _refuse(tensor: torch.Tensor, reason: str) -> UncoveredOpError:
    return refusal("attention", tensor.dtype, tensor.device.type, reason)


def causal_spans(batch: int, length: int, device: torch.device | str) -> torch.Tensor:
    """Every row starts at column 0 and its last query sees all `length` keys."""
    # Not from a list: that is a copy from the host, which a CUDA graph cannot capture.
    ends = torch.arange(2, dtype=torch.int32, device=device) * length
    return ends.expand(batch, 1, 2)


def spans_from_mask(visible: torch.Tensor, origin: torch.Tensor | None = None) -> torch.Tensor:
    """Spans of a boolean mask [B, Q, KV]; without `origin` [B], rows start at their first key."""
    length = visible.shape[-1]
    count = visible.sum(-1)
    begin = visible.int().argmax(-1)
    end = begin + count
    last = length - visible.flip(-1).int().argmax(-1)
    sees = count > 0
    if not _is_capturing() and not bool(((end == last) | ~sees).all()):
        raise _refuse(visible, "a query sees keys with gaps between them")
    if origin is None:
        first = torch.where(sees, begin, length).amin(-1)
        if not bool(((begin == first[:, None]) | ~sees).all()):
            raise _refuse(
                visible,
                "queries of one row start at different keys (a sliding window or packed "
                f"sequences), which needs attn_implementation='{NAME}'",
            )
        origin = first
    return torch.stack([origin[:, None].expand_as(begin), begin, end], -1).to(torch.int32)


def as_causal(spans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """(start [B], end [B], window) of spans: causal ones, or a window of the last keys.

    For kernels that take no spans. Raises UnsupportedCallError if spans are neither.
    """
    if spans.shape[-1] == 2:
        return spans[:, 0, 0], spans[:, 0, 1], None
    origin, begin, end = spans.unbind(-1)
    start, stop = origin[:, :1], end[:, -1:]
    expected = stop - torch.arange(spans.shape[1] - 1, -1, -1, device=spans.device)
    sees = expected > start
    cut = sees & (begin > start)
    window = int((end - begin)[cut].amax()) if bool(cut.any()) else None
    first = start if window is None else torch.maximum(start, expected - window)
    fits = (origin == start) & torch.where(
        sees, (end == expected) & (begin == first.clamp(min=0)), end <= begin
    )
    if not bool(fits.all()):
        raise UnsupportedCallError("it has no other masks than causal ones and windows")
    return start[:, 0], stop[:, 0], window


def register_attention() -> None:
    """Make `attn_implementation="ndcheck_invariant"` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _mask_maker(causal_mask_function, sdpa_mask))


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What a transformers attention module calls; the mask comes from `_mask_maker`."""
    if dropout or kwargs.get("position_bias") is not None:
        raise _refuse(query, f"it has no {'dropout' if dropout else 'position_bias'}")
    if active_scope() is None:
        _refuse_outside_scope()
    batch, _, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    sinks = kwargs.get("s_aux")
    if kwargs.get("cache") is not None:

        def attend(*operands: torch.Tensor) -> torch.Tensor:
            return attention_op(*operands, scale, softcap or 0.0, sinks=sinks)

        try:
            out = paged_attention(module, query, key, value, kwargs, attend)
        except UnsupportedCallError as unsupported:
            raise _refuse(query, str(unsupported)) from None
        return out.transpose(1, 2).contiguous(), None
    if isinstance(attention_mask, Spans):
        spans = attention_mask.plain()[:, 0]
    elif attention_mask is None and (is_causal is None and getattr(module, "is_causal", True)):
        key, value = (key, value) if length == 1 else (key[:, :, :length], value[:, :, :length])
        spans = causal_spans(batch, key.shape[2], query.device)
    else:
        spans = spans_from_any(attention_mask, bool(is_causal), query, key)
    out = attention_op(query, key, value, spans, scale, softcap or 0.0, sinks=sinks)
    return out.transpose(1, 2).contiguous(), None


def register_sdpa(device: str, attention: Callable[..., torch.Tensor]) -> None:
    """Register torch's own attention for a device, from what it has for `attention_op`."""

    @implements(torch.ops.aten.scaled_dot_product_attention.default, device=device)
    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """It refuses masks from which a row's first token cannot be told."""
        if dropout_p or query.dim() != 4:
            raise UnsupportedCallError("dropout, or tensors that are not 4-dimensional")
        spans = spans_from_any(attn_mask, is_causal, query, key)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        return attention(query, key, value, spans, factor)


def spans_from_any(
    mask: torch.Tensor | None, is_causal: bool, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Spans of what scaled_dot_product_attention takes; a causal mask is aligned top left."""
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if is_causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    if mask.dim() == 4:
        if mask.shape[1] != 1:
            raise _refuse(query, "every head has a mask of its own")
        mask = mask[:, 0]
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min
        if not bool(((mask == 0) | (mask <= lowest)).all()):
            raise _refuse(query, "a bias is added to the scores")
        mask = mask == 0
    return spans_from_mask(mask.expand(batch, queries, keys))


def _mask_maker(
    causal: Callable[..., Any], sdpa_mask: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """The mask function for transformers: spans, as a 4-dimensional tensor that models pass on."""

    def make(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | torch.Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = causal,
        attention_mask: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> torch.Tensor:
        first = torch.zeros(batch_size, dtype=torch.int64, device=device)
        if attention_mask is not None:
            first = attention_mask.int().argmax(-1)
        origin = first - kv_offset
        end = q_offset + q_length - kv_offset
        untouched = mask_function is causal and kv_offset == 0
        if untouched and _has_no_gaps(attention_mask, first, q_offset + q_length):
            spans = torch.stack([origin, torch.zeros_like(origin) + end], -1)
            return spans[:, None, None].int().as_subclass(Spans)
        kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        visible = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **kwargs,
        )
        return spans_from_mask(visible[:, 0], origin)[:, None].as_subclass(Spans)

    return make


def _is_capturing() -> bool:
    """Whether nothing can be read back now: what steps before the capture checked has to do."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _has_no_gaps(
    attention_mask: torch.Tensor | None, first: torch.Tensor, stop: int | torch.Tensor
) -> bool:
    """Whether each row is padded on the left only, up to column `stop`."""
    if attention_mask is None or _is_capturing():
        return True
    column = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    own = (column >= first[:, None]) & (column < stop)
    return bool((attention_mask.bool() | ~own).all())
