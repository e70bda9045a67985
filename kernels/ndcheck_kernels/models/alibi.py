"""BLOOM's attention by the attention op: its own is a softmax over padded keys, with no interface.

Computes: softmax(q k^T / sqrt(head_dim) + slope * position) v, position counted from the row's
    first token, the ALiBi term rounded to the model's dtype as in the model.
Reduction order: that of the attention op.
Depends on: what the attention op does.
Dtypes: those of the attention op.
Not claimed: training, dropout, slices for tensor parallelism (pretraining_tp > 1): refused.
"""

import functools
import math
from typing import Any

import torch

from ndcheck_kernels.ops.attention import attention_op, spans_from_any
from ndcheck_kernels.scope.refusal import refusal
from ndcheck_kernels.scope.state import active_scope


def replace_attention() -> None:
    """Let BLOOM's attention take another way inside a scope; once."""
    from transformers.models.bloom.modeling_bloom import BloomAttention

    own = BloomAttention.forward
    if hasattr(own, "__wrapped__"):
        return

    @functools.wraps(own)
    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return (own if active_scope() is None else _bloom_attention)(module, *args, **kwargs)

    BloomAttention.forward = forward


def _bloom_attention(
    module: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    alibi: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if (
        module.training
        or output_attentions
        or (module.pretraining_tp > 1 and module.slow_but_exact)
    ):
        reason = "no training, returned weights or tensor-parallel slices"
        raise refusal("attention", hidden_states.dtype, hidden_states.device.type, reason)
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    spans = spans_from_any(attention_mask, attention_mask is None, query, key)
    slopes = alibi_slopes(module.num_heads).to(query.device)
    out = attention_op(query, key, value, spans, module.inv_norm_factor, 0.0, slopes=slopes)
    out = module.dense(out.transpose(1, 2).flatten(2))
    return residual + out, None


@functools.lru_cache(maxsize=16)
def alibi_slopes(heads: int) -> torch.Tensor:
    """[heads] float32, geometric from 2^(-8/n) (Press, Smith and Lewis 2022).

    Without a power of two of heads, every second slope of twice as many fills up.
    """
    whole = 2 ** math.floor(math.log2(heads))
    steps = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    steps += [2 ** (-4 * (i + 1) / whole) for i in range(0, 2 * (heads - whole), 2)]
    return torch.tensor(steps, dtype=torch.float32)
