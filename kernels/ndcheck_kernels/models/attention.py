"""Attention as a transformers model calls it: spans in the mask's place, and the attention op.

`invariant_model` names it to the model; see `ops.attention` for spans and the order of summation.
"""

from collections.abc import Callable
from typing import Any

import torch

from ndcheck_kernels.models.caches.paged import paged_attention
from ndcheck_kernels.models.interface import past_the_mode, require_scope
from ndcheck_kernels.ops.attention import (
    attention_op,
    causal_spans,
    is_capturing,
    refuse_attention,
    spans_from_any,
    spans_from_mask,
)
from ndcheck_kernels.ops.library import NAME
from ndcheck_kernels.scope.refusal import UnsupportedCallError, refusal

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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What a transformers attention module calls; the mask comes from `_mask_maker`."""
    if dropout or kwargs.get("position_bias") is not None:
        raise refuse_attention(query, f"it has no {'dropout' if dropout else 'position_bias'}")
    require_scope("attn", stock="sdpa")
    batch, _, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    is_causal: bool | None = kwargs.get("is_causal")
    sinks = kwargs.get("s_aux")
    if "read_index" in kwargs:  # A paged cache's.

        def attend(*operands: torch.Tensor) -> torch.Tensor:
            return attention_op(*operands, scale, softcap or 0.0, sinks=sinks)

        try:
            out = paged_attention(module, query, key, value, kwargs, attend)
        except UnsupportedCallError as unsupported:
            raise refuse_attention(query, str(unsupported)) from None
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
        # Integers, whose arithmetic is exact in any order: the mode would judge each op of it.
        with past_the_mode():
            first = torch.zeros(batch_size, dtype=torch.int64, device=device)
            if attention_mask is not None:
                first = attention_mask.int().argmax(-1)
            origin = first - kv_offset
            end = q_offset + q_length - kv_offset
            untouched = mask_function is causal and kv_offset == 0
            if untouched and _has_no_gaps(attention_mask, first, q_offset + q_length):
                # Starts in a row, and ends: kernels read them without a copy for each layer.
                spans = torch.stack([origin, torch.zeros_like(origin) + end]).int().t()
                return spans[:, None, None].as_subclass(Spans)
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


def _has_no_gaps(
    attention_mask: torch.Tensor | None, first: torch.Tensor, stop: int | torch.Tensor
) -> bool:
    """Whether each row is padded on the left only, up to column `stop`."""
    if attention_mask is None or is_capturing():
        return True
    column = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    own = (column >= first[:, None]) & (column < stop)
    return bool((attention_mask.bool() | ~own).all())
