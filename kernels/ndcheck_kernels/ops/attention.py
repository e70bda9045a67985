"""Attention as an op of its own, and the spans that say who sees whom.

`torch.ops.ndcheck_kernels.attention` has no kernel of its own: inside `invariant_kernels()` it goes
to the implementation registered for the device, and outside it fails. A query sees one contiguous
run of keys, so an int32 tensor of *spans* replaces the mask:

- [B, 1, 2], causal: (start, end). Query i of Q sees the keys in [start, end - (Q - 1 - i)).
- [B, Q, 3], any: (origin, begin, end). The query sees the keys in [begin, end).

Splits of the keys are counted from the row's own first token, at column `start` or `origin`, which
is negative if a sliding cache has dropped it. So padding shifts nothing.

`sinks` [H] is one more score per head, with no value: weights sum to less than 1. `slopes` [H] adds
slope * (column - the row's first column) to the scores (ALiBi), in float32, rounded to `bias_dtype`
where a model does so.
"""

import math
from collections.abc import Callable

import torch

from ndcheck_kernels.ops.library import NAME, declare
from ndcheck_kernels.scope.refusal import UncoveredOpError, UnsupportedCallError, refusal
from ndcheck_kernels.scope.registry import implements

attention_op = declare(
    "attention(Tensor query, Tensor key, Tensor value, Tensor spans, float scale, "
    "float softcap=0.0, Tensor? sinks=None, Tensor? slopes=None, "
    "ScalarType? bias_dtype=None) -> Tensor"
)


def refuse_attention(tensor: torch.Tensor, reason: str) -> UncoveredOpError:
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
    if not is_capturing() and not bool(((end == last) | ~sees).all()):
        raise refuse_attention(visible, "a query sees keys with gaps between them")
    if origin is None:
        first = torch.where(sees, begin, length).amin(-1)
        if not is_capturing() and not bool(((begin == first[:, None]) | ~sees).all()):
            raise refuse_attention(
                visible,
                "queries of one row start at different keys (a sliding window or packed "
                f"sequences), which needs attn_implementation='{NAME}'",
            )
        origin = first
    return torch.stack([origin[:, None].expand_as(begin), begin, end], -1).to(torch.int32)


def as_causal(spans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int | None, bool]:
    """(start [B], end [B], window, chunked) of spans: causal ones, a window of the last keys, or
    chunks of as many, counted from the row's first token.

    For kernels that take no spans. Raises UnsupportedCallError if spans are none of these.
    """
    if spans.shape[-1] == 2:
        return spans[:, 0, 0], spans[:, 0, 1], None, False
    origin, begin, end = spans.unbind(-1)
    start, stop = origin[:, :1], end[:, -1:]
    expected = stop - torch.arange(spans.shape[1] - 1, -1, -1, device=spans.device)
    sees = expected > start
    cut = sees & (begin > start)

    def fit(first: torch.Tensor) -> bool:
        seen = (end == expected) & (begin == first.clamp(min=0))
        return bool(((origin == start) & torch.where(sees, seen, end <= begin)).all())

    if not bool(cut.any()):
        window, chunked, fits = None, False, fit(start)
    else:
        window, chunked = int((end - begin)[cut].amax()), False
        fits = fit(torch.maximum(start, expected - window))
        if not fits:
            # Of the lengths that give these chunks the largest: every one hides the same keys.
            window, chunked = math.gcd(*(begin - start)[cut].unique().tolist()), True
            fits = fit(start + (expected - 1 - start) // window * window)
    if not fits:
        raise UnsupportedCallError("it has no other masks than causal ones, windows and chunks")
    return start[:, 0], stop[:, 0], window, chunked


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
        if dropout_p or any(each.dim() != 4 for each in (query, key, value)):
            raise UnsupportedCallError("dropout, or tensors that are not 4-dimensional")
        if is_causal and attn_mask is not None:
            raise UnsupportedCallError("is_causal beside a mask")
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float, query.dtype):
            raise UnsupportedCallError(f"a mask of {attn_mask.dtype} over {query.dtype}")
        _check_operands(query, key, value, enable_gqa=enable_gqa)
        if not key.numel() or not query.numel():
            return query.new_zeros(*query.shape[:-1], value.shape[-1])
        spans = spans_from_any(attn_mask, is_causal, query, key)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        return attention(query, key, value, spans, factor)


def _check_operands(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, enable_gqa: bool
) -> None:
    if not query.dtype == key.dtype == value.dtype:
        raise UnsupportedCallError(f"query, key, value: {query.dtype}, {key.dtype}, {value.dtype}")
    (batch, heads, _, width), (_, kv_heads, keys, _) = query.shape, key.shape
    groups = kv_heads and heads % kv_heads == 0 if enable_gqa else heads == kv_heads
    shapes = (batch, kv_heads, keys, width), (batch, kv_heads, keys)
    if not groups or not width or (key.shape, value.shape[:3]) != shapes:
        shown = ", ".join(str(list(each.shape)) for each in (query, key, value))
        raise UnsupportedCallError(f"query, key and value of {shown}")


def spans_from_any(
    mask: torch.Tensor | None, is_causal: bool, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Spans of what scaled_dot_product_attention takes; a causal mask is aligned top left."""
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if is_causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    if mask.dim() < 2:
        raise refuse_attention(query, f"a mask of {mask.dim()} dims")
    if mask.dim() > 2:
        if mask.shape[-3] != 1:
            raise refuse_attention(query, "every head has a mask of its own")
        mask = mask.squeeze(-3)
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise refuse_attention(query, f"a mask of {mask.dtype}")
        lowest = torch.finfo(mask.dtype).min
        if not is_capturing() and not bool(((mask == 0) | (mask <= lowest)).all()):
            raise refuse_attention(query, "a bias is added to the scores")
        mask = mask == 0
    return spans_from_mask(mask.expand(batch, queries, keys))


def is_capturing() -> bool:
    """Whether nothing can be read back now: what steps before the capture checked has to do."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
