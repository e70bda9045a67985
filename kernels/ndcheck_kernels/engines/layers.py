"""What vLLM's layers call in place of its own: products, the experts, log-softmax.

Computes: x @ weight.T + bias, of FP8 weights in blocks of 128 x 128 as `ops.block_fp8` says; the
    same for the output layer; a token's experts, weighted and added; log-softmax over the last
    dimension; the sum of what all ranks have, rounded by each of them before. Attention stays
    vLLM's: `attention_step` chooses its kernel.
Reduction order: that of `cuda.products`, `cuda.experts`, `cuda.rows.softmax` and
    `cuda.rows.add_parts`; a bias is added before the one rounding. FP8 experts take their rows as
    vLLM has quantised them, each by itself.
Depends on: as they do, never on the other tokens of a step.
Dtypes: bfloat16, float16, float32; weights also float8_e4m3fn.
Not claimed: other quantised layers: `fp8_refusal`; experts with biases or spread over ranks:
    `experts_refusal`; ranks that are no power of two, and sums that are scattered over them.

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
from ndcheck_kernels.cuda.products.fp8.fp8_matmul import fp8_matmul, grouped_fp8_matmul
from ndcheck_kernels.cuda.products.grouped_matmul import combine, grouped_gate, grouped_matmul
from ndcheck_kernels.cuda.rows import softmax
from ndcheck_kernels.cuda.rows.add_parts import add_parts
from ndcheck_kernels.cuda.rows.quantise import Quantised, quantise_rows, silu_mul_quantise
from ndcheck_kernels.ops.block_fp8 import BLOCK
from ndcheck_kernels.scope.refusal import UnsupportedCallError

NAME = "ndcheck_engines"
library = torch.library.Library(NAME, "DEF")
_PRODUCT = "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
_FP8_PRODUCT = "(Tensor x, Tensor weight, Tensor scales, Tensor? bias) -> Tensor"
COVERED = "ndcheck_covered"
"""An attribute that the plug-in gives FP8 linear layers of vLLM's whose products are ours."""

fires: Counter[str] = Counter()
"""How often each op ran; replays of a CUDA graph, which run no Python, are not counted."""
weights_seen: set[int] = set()
"""Where the weights lie that were multiplied by."""
output_sizes: list[int] = []
"""Numbers of rows, ascending, that the output layer was made ready for."""
LONGEST_QUERY = 256
"""Beyond the 192 rows of FlashAttention 3's largest tile, also with one head to a key head."""
vllms_own: dict[str, Any] = {}
"""vLLM's functions, for what ours leave to them, and its class of sums over two ranks."""


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


def _block_fp8(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    _fire("block_fp8", weight)
    codes = quantise_rows(x.reshape(-1, x.shape[-1]))
    out = fp8_matmul(*codes, weight, scales, bias, dtype=x.dtype)
    return out.view(*x.shape[:-1], len(weight))


def _product_shape(x: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


for _name, _arguments, _function in (
    ("linear", _PRODUCT, _linear),
    ("output", _PRODUCT, _output),
    ("block_fp8", _FP8_PRODUCT, _block_fp8),
):
    library.define(_name + _arguments)
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


def fp8_linear(
    self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """What `Fp8LinearMethod.apply` computes; the names are vLLM's."""
    if not getattr(layer, COVERED, False):
        return vllms_own["fp8_linear"](self, layer, x, bias)
    return block_fp8_linear(x, layer.weight, layer.weight_scale_inv, bias)


def block_fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[..., K] x [N, K]^T with scales [N / 128, K / 128], + [N]."""
    return torch.ops.ndcheck_engines.block_fp8(x, weight, scales, bias)


def fp8_refusal(weight: torch.Tensor, scales: Any, block: Any) -> str | None:
    """Why FP8 weights [..., N, K], as vLLM holds them after loading, stay its own; or None."""
    if block is None or list(block) != [BLOCK, BLOCK]:
        return f"FP8 in blocks of {block}" if block else "FP8 without blocks"
    if weight.dtype != torch.float8_e4m3fn or weight.shape[-1] % 16:
        return f"FP8 weights as {weight.dtype} {tuple(weight.shape)}"
    shape = (*weight.shape[:-2], *(-(-size // BLOCK) for size in weight.shape[-2:]))
    if scales is None or scales.dtype != torch.float32 or tuple(scales.shape) != shape:
        found = "none" if scales is None else f"{scales.dtype} {tuple(scales.shape)}"
        return f"scales in a kernel's own layout: {found}"
    if not weight.is_contiguous() or not scales.is_contiguous():
        return "weights or scales in a kernel's own layout"
    return None


def communicator(self: Any, *given: Any, **named: Any) -> None:
    """`CudaCommunicator.__init__`, for two ranks with the kernel that vLLM's stock mode adds by.

    Its invariant mode leaves that out, though two numbers have one sum in any order.
    """
    vllms_own["communicator"](self, *given, **named)
    if self.world_size == 2 and self.ca_comm is None and "tp" in self.unique_name:
        self.ca_comm = vllms_own["pair"](group=self.cpu_group, device=self.device)


def all_reduce(self: Any, input_: torch.Tensor) -> torch.Tensor:
    """What `CudaCommunicator.all_reduce` computes; the names are vLLM's.

    Two ranks add by vLLM's own kernel what it takes: in fp32, rounded once, as here. Otherwise
    every rank gathers all parts, which NCCL only moves, and adds them in their order.
    """
    ranks = self.pynccl_comm
    if ranks is None or ranks.disabled or input_.dtype not in device.FLOATS:
        return vllms_own["all_reduce"](self, input_)  # One rank, or integers: exact in any order.
    fires["all_reduce"] += 1
    pair = self.ca_comm if self.world_size == 2 else None
    if pair is not None and pair.should_custom_ar(input_):
        total: torch.Tensor = pair.custom_all_reduce(input_)
        return total
    parts = input_.new_empty(self.world_size, *input_.shape)
    ranks.all_gather(parts, input_.contiguous())
    return add_parts(parts)


def reduce_scatter(self: Any, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """What `CudaCommunicator.reduce_scatter` would leave to NCCL; the names are vLLM's."""
    raise UnsupportedCallError(
        "ndcheck: sums that are scattered over ranks have no fixed order: turn sequence and expert "
        "parallelism off, or set NDCHECK_VLLM=partial"
    )


def attention_step(
    self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
) -> Any:
    """`FlashAttentionMetadataBuilder.build`, with the same kernel in every step.

    FlashAttention 3 chooses one by the longest query of a step, and with it the blocks of keys that
    are added up (vllm-project/vllm#51902). So every step is said to have a query beyond its largest
    tile. Nothing is computed for it: which queries there are, each request says.
    """
    step = vllms_own["attention_step"](self, common_prefix_len, common_attn_metadata, fast_build)
    step.max_query_len = longest_query(self.headdim, step.max_query_len)
    return step


def longest_query(head_size: int, longest: int) -> int:
    """What is said in place of a step's own; between 64 and 128 all blocks have 128 keys."""
    return longest if 64 < head_size <= 128 else max(longest, LONGEST_QUERY)


def has_kernels_by_window(head_size: int) -> bool:
    """Whether a window that no request of a step fills makes it choose other blocks of keys."""
    return not 64 < head_size <= 192


def log_softmax(input: torch.Tensor, dim: int, _half_to_float: bool) -> torch.Tensor:
    fires["log_softmax"] += 1
    return softmax.log_softmax(input, dim, torch.float32 if _half_to_float else None)


def experts_refusal(own: Any, given: Mapping[str, Any]) -> str | None:
    """Why vLLM's `TritonExperts` keep what they are given to themselves, or None."""
    silu = getattr(given["activation"], "value", given["activation"]) == "silu"
    if own.quant_dtype == torch.float8_e4m3fn:
        for weight, scales in ((given["w1"], own.w1_scale), (given["w2"], own.w2_scale)):
            if (reason := fp8_refusal(weight, scales, own.block_shape)) is not None:
                return reason
        if given["w1"].shape[1] % (2 * BLOCK):
            return f"blocks of {BLOCK} that span gates and values"
    elif own.quant_dtype is not None or given["w1"].dtype.itemsize == 1:
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


def experts(own: Any, given: Mapping[str, Any]) -> None:
    """What `TritonExperts.apply` writes to ``output`` [T, H].

    hidden_states [T, H], w1 [E, 2 I, H] (gates first), w2 [E, H, I], topk_weights and topk_ids
    [T, k]; of FP8 hidden_states as codes with a1q_scale [T, H / 128].
    """
    w1 = given["w1"]
    _fire("experts", w1)
    index, weights = given["topk_ids"], given["topk_weights"]
    token, _, place, weights, ends = route_experts(index, weights, len(w1))
    products = _plain_products if w1.dtype.itemsize > 1 else _fp8_products
    given["output"].copy_(combine(products(own, given, token, ends), place, weights))


def _plain_products(
    own: Any, given: Mapping[str, Any], token: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    gated = grouped_gate(given["hidden_states"], token, given["w1"].mT, ends)
    return grouped_matmul(gated, given["w2"].mT, ends)


def _fp8_products(
    own: Any, given: Mapping[str, Any], token: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    dtype = given["output"].dtype
    codes = _rows_at(token, given["hidden_states"], given["a1q_scale"])
    gate, up = grouped_fp8_matmul(*codes, given["w1"], own.w1_scale, ends, dtype=dtype).chunk(2, -1)
    codes = silu_mul_quantise(gate, up)
    return grouped_fp8_matmul(*codes, given["w2"], own.w2_scale, ends, dtype=dtype)


def _rows_at(token: torch.Tensor, x: torch.Tensor, scales: torch.Tensor | None) -> Quantised:
    if scales is None:  # vLLM leaves it to the kernel.
        return quantise_rows(x, token)
    codes = x.view(torch.uint8)[token].view(x.dtype)  # Not every torch indexes FP8.
    return codes, scales.t().index_select(1, token.long()).t()
