"""What vLLM's layers call in place of its own: products, the experts, log-softmax.

Computes: x @ weight.T + bias; the same for the output layer; a token's experts, weighted and added;
    log-softmax over the last dimension.
Reduction order: that of `cuda.products`, `cuda.experts` and `cuda.rows.softmax`; a bias is added
    before the one rounding.
Depends on: as they do, never on the other tokens of a step.
Dtypes: bfloat16, float16, float32.
Not claimed: quantised layers, experts with biases or spread over ranks: `experts_refusal`.

The products are ops of torch's, with a fake implementation, so that torch.compile keeps them as
they are and a CUDA graph captures the kernels. They are reached through Python functions of this
file, since vLLM keeps compiled graphs under a hash of the files that it traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import borrows
from ndcheck_kernels.cuda.experts import route_experts
from ndcheck_kernels.cuda.products import matmul
from ndcheck_kernels.cuda.products.grouped_matmul import combine, grouped_matmul
from ndcheck_kernels.cuda.rows import softmax
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul

NAME = "ndcheck_engines"
library = torch.library.Library(NAME, "DEF")
_PRODUCT = "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"

fires: Counter[str] = Counter()
"""How often each op ran; replays of a CUDA graph, which run no Python, are not counted."""
weights_seen: set[int] = set()
"""Where the weights lie that were multiplied by."""
output_sizes: list[int] = []
"""Numbers of rows, ascending, that the output layer was made ready for."""


def _fire(op: str, weight: torch.Tensor) -> None:
    fires[op] += 1
    weights_seen.add(weight.data_ptr())


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    _fire("linear", weight)
    return matmul.linear(x, weight, bias)


def _output(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Filled up to a number of rows whose borrowed product is proven, where that is faster.

    The output layer runs outside of vLLM's graphs, with as many rows as there are requests.
    """
    _fire("output", weight)
    m, (n, k) = len(x), weight.shape
    size = next((size for size in output_sizes if size >= m), m)
    if size == m or not borrows(size, n, k, x.element_size(), device.capability(x.device)):
        return matmul.linear(x, weight, bias)
    rows = x.new_empty(size, k)
    rows[:m] = x
    return matmul.linear(rows, weight, bias)[:m]


def _product_shape(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


for _name, _function in (("linear", _linear), ("output", _output)):
    library.define(_name + _PRODUCT)
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAME}::{_name}", _product_shape, lib=library)


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[..., K] x [N, K]^T + [N]; the names are vLLM's."""
    return torch.ops.ndcheck_engines.linear(input, weight, bias)


def output(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[M, K] x [N, K]^T + [N]."""
    return torch.ops.ndcheck_engines.output(input, weight, bias)


def log_softmax(input: torch.Tensor, dim: int, _half_to_float: bool) -> torch.Tensor:
    fires["log_softmax"] += 1
    return softmax.log_softmax(input, dim, torch.float32 if _half_to_float else None)


def experts_refusal(own: Any, given: Mapping[str, Any]) -> str | None:
    """Why vLLM's `TritonExperts` keep what they are given to themselves, or None."""
    silu = getattr(given["activation"], "value", given["activation"]) == "silu"
    if own.quant_dtype is not None or not given["w1"].is_floating_point():
        return "quantised"
    if own.w1_bias is not None or own.w2_bias is not None:
        return "experts with biases"
    if not silu or own.gemm1_clamp_limit is not None:
        return f"another activation than SiLU: {given['activation']}"
    if given["expert_map"] is not None:
        return "experts spread over ranks"
    if given["apply_router_weight_on_input"]:
        return "router weights on the input"
    return None if getattr(own, "_lora_context", None) is None else "LoRA"


def experts(given: Mapping[str, Any]) -> None:
    """What `TritonExperts.apply` writes to ``output`` [T, H].

    hidden_states [T, H], w1 [E, 2 I, H] (gates first), w2 [E, H, I], topk_weights and topk_ids
    [T, k].
    """
    x, w1, w2 = given["hidden_states"], given["w1"], given["w2"]
    _fire("experts", w1)
    index, weights = given["topk_ids"], given["topk_weights"]
    token, _, place, weights, ends = route_experts(index, weights, len(w1))
    gate, up = grouped_matmul(x[token], w1.mT, ends).chunk(2, -1)
    rows = grouped_matmul(silu_mul(gate, up), w2.mT, ends)
    given["output"].copy_(combine(rows, place, weights))
