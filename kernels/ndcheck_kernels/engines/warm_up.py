"""Running every op once for the numbers of rows that it will meet.

What Triton compiles at a first launch, and what must be proven before cuBLASLt may compute it,
would otherwise stop a request. Proofs need room for a few copies of the largest weight, so they
come before vLLM fills the memory with its cache; after them nothing more is tried.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ndcheck_kernels.cuda.products import borrowed
from ndcheck_kernels.cuda.rows.quantise import quantise_rows
from ndcheck_kernels.engines import layers
from ndcheck_kernels.engines.coverage import Layer

OUTPUT_STEP = 64
"""Between numbers of requests above vLLM's largest graph."""


def token_counts(config: Any) -> list[int]:
    """Numbers of tokens of a step: those of vLLM's graphs, and some of each launch table above."""
    most = int(config.scheduler_config.max_num_batched_tokens)
    captured = config.compilation_config.cudagraph_capture_sizes or [1]
    return sorted({min(n, most) for n in (*captured, 16, 32, 64, 128, 256, 512, 1024, 2048, most)})


def request_counts(config: Any) -> list[int]:
    """Numbers of requests of a step, to which the output layer's rows are filled up."""
    most = int(config.scheduler_config.max_num_seqs)
    captured = [n for n in config.compilation_config.cudagraph_capture_sizes or [] if n < most]
    return sorted(
        {*captured, *range(max(captured, default=0) + OUTPUT_STEP, most, OUTPUT_STEP), most}
    )


def warm_up(listed: Iterable[Layer], config: Any) -> None:
    """Run the op of every shape among the covered layers."""
    layers.output_sizes[:] = request_counts(config)
    shapes = {
        (layer.op, layer.weight.shape, layer.weight.dtype): layer
        for layer in listed
        if layer.weight is not None
    }
    for (op, *_), layer in shapes.items():
        assert layer.weight is not None
        for n in layers.output_sizes if op == "output" else token_counts(config):
            _run(layer, n)
    borrowed.settle()
    # These calls prove nothing of what vLLM calls.
    layers.fires.clear()
    layers.weights_seen.clear()
    torch.cuda.empty_cache()


def _run(layer: Layer, n: int) -> None:
    op, weight = layer.op, layer.weight
    assert weight is not None
    is_fp8 = weight.dtype.itemsize == 1
    dtype = layer.module.orig_dtype if is_fp8 else weight.dtype
    x = weight.new_zeros(n, weight.shape[-1], dtype=dtype)
    if op == "block_fp8":
        layers.block_fp8_linear(x, weight, layer.module.weight_scale_inv)
    elif op == "output":
        layers.output(x, weight)
        layers.log_softmax(x.new_zeros(n, weight.shape[0], dtype=torch.float32), -1, False)
    elif op == "linear":
        layers.linear(x, weight)
    else:
        experts = len(weight)
        index = torch.arange(n * 2, device=x.device, dtype=torch.int32).view(n, 2) % experts
        codes, scales = (x, None)
        if is_fp8:
            codes, scales = quantise_rows(x)
        layers.experts(
            layer.module.quant_method.moe_kernel.fused_experts,
            {
                "output": torch.empty_like(x),
                "hidden_states": codes,
                "a1q_scale": scales,
                "w1": weight,
                "w2": layer.module.w2_weight,
                "topk_ids": index,
                "topk_weights": x.new_zeros(n, 2, dtype=torch.float32),
            },
        )
