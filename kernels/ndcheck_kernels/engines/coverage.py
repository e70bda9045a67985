"""What computes each layer of a model that vLLM has loaded.

A layer is covered if its kind is in the tables here, whose code was read in the sources of
`seams.RELEASES`; whatever is not is named. Layers are told by the names of vLLM's classes, so that
nothing here imports it; a class of a model's own code has its module in its name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ndcheck_kernels.engines.layers import (
    COVERED,
    attention_step,
    experts_refusal,
    fp8_refusal,
    has_kernels_by_window,
)

MODELS = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Model classes whose forward passes compute by the layers below only."""

LINEAR = (
    "GateLinear",
    "ColumnParallelLinear",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "RowParallelLinear",
)
_POINTWISE = "pointwise"
_OTHERS = {
    "VocabParallelEmbedding": "a look-up",
    "SiluAndMul": _POINTWISE,
    "RotaryEmbedding": _POINTWISE,
    "LinearScalingRotaryEmbedding": _POINTWISE,
    "Llama3RotaryEmbedding": _POINTWISE,
    "YaRNScalingRotaryEmbedding": _POINTWISE,
    "ApplyRotaryEmb": _POINTWISE,
    "LogitsProcessor": "by the output layer",
    "UnquantizedFusedMoEMethod": "by its experts",
    "PPMissingLayer": "on another rank",
}
ATTENTION, VERSION = ("FLASH_ATTN",), 3
"""Backends that were measured with one split, along all axes, and the version of that one."""
FUSED_SUMS = ("fuse_allreduce_rms", "enable_sp", "fuse_gemm_comms")
"""Passes of vLLM's compiler that put other sums over ranks in the place of ours."""
FUSED_NORM = "enable_qk_norm_rope_fusion"
"""The one that puts another norm in the place of those listed."""

PACKAGES = ("vllm", "torch")
"""Whose classes are known by their names alone."""
WRAPPERS = "vllm.lora."
"""Where those are that hold a layer of vLLM's and add products of their own."""


OWN_STORE = "CPUOffloadingSpec"
OWN_KEYS = ("OffloadingConnector", "SimpleCPUOffloadConnector")
"""Connectors that give an engine back what it computed itself."""


def kind_of(found: Any) -> str:
    """The name of an object's class."""
    kind = type(found)
    is_known = kind.__module__.partition(".")[0] in PACKAGES
    return kind.__name__ if is_known else f"{kind.__module__}.{kind.__name__}"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, what computes it, and the weight that its op must be seen with."""

    name: str
    kind: str
    by: str
    op: str | None = None
    covered: bool = True
    weight: torch.Tensor | None = None
    module: Any = None
    """Of FP8 weights, which come with scales."""


def list_layers(model: Any, config: Any) -> list[Layer]:
    """Every module of a model that computes something, by vLLM's configuration, and settings by
    which something else computes."""
    layers = list(_layers(model, config))
    has_experts = any(layer.kind == "RoutedExperts" for layer in layers)
    return [*layers, *_settings(config, has_experts=has_experts)]


def _settings(config: Any, *, has_experts: bool) -> Iterator[Layer]:
    parallel, passes = config.parallel_config, config.compilation_config.pass_config
    transfer = config.kv_transfer_config
    connector = transfer and transfer.kv_connector
    # By default main memory; tiers behind it may hold another engine's.
    store = transfer and transfer.kv_connector_extra_config.get("spec_name", OWN_STORE)
    found = {
        "kv_transfer_config": (
            connector not in (None, *OWN_KEYS) or store not in (None, OWN_STORE),
            f"keys and values that {connector} brings from elsewhere",
        ),
        "speculative_config": (
            config.speculative_config is not None,
            "drafts, and passes that verify them",
        ),
        "data_parallel_size": (
            parallel.data_parallel_size > 1 and has_experts,
            "sums of experts, scattered over ranks",
        ),
        **{
            name: (getattr(parallel, name) > 1, "attention in parts, added over ranks")
            for name in ("decode_context_parallel_size", "prefill_context_parallel_size")
        },
        **{
            f"pass_config.{name}": (
                parallel.tensor_parallel_size > 1 and getattr(passes, name, False),
                "vLLM's own sums over ranks",
            )
            for name in FUSED_SUMS
        },
        f"pass_config.{FUSED_NORM}": (
            getattr(passes, FUSED_NORM, False),
            "vLLM's norms of queries and keys, fused with their rotation",
        ),
    }
    for name, (is_set, by) in found.items():
        if is_set:
            yield Layer(name, "setting", by, covered=False)


def _layers(model: torch.nn.Module, config: Any) -> Iterator[Layer]:
    head = getattr(model, "lm_head", None)
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind == "ParallelLMHead" or (module is head and kind == "VocabParallelEmbedding"):
            yield _output(name, module, config.model_config.head_dtype)
        elif kind in LINEAR:
            yield _product(name, module, "linear")
        elif kind == "RoutedExperts":
            yield _experts(name, module)
        elif kind == "RMSNorm":
            by, covered = _norm(module, config)
            yield Layer(name, kind, by, covered=covered)
        elif kind == "Attention":
            yield _attention(name, module)
        elif kind in _OTHERS:
            yield Layer(name, kind, _OTHERS[kind])
        elif type(module).__module__.startswith(WRAPPERS):
            yield Layer(name, kind, "vLLM's LoRA kernels", covered=False)
        elif any(True for _ in module.parameters(recurse=False)) or not _has_children(module):
            yield Layer(name, kind, "nothing", covered=False)


def _has_children(module: torch.nn.Module) -> bool:
    # An empty list of modules computes as little as a full one.
    return isinstance(module, torch.nn.ModuleList) or any(True for _ in module.children())


def _product(name: str, module: Any, op: str) -> Layer:
    kind, method = kind_of(module), kind_of(module.quant_method)
    is_fp8 = method == "Fp8LinearMethod"
    if not is_fp8 and method not in ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"):
        return Layer(name, kind, f"vLLM's {method}", covered=False)
    if any(name.startswith("allow_") and value for name, value in vars(module).items()):
        return Layer(name, kind, "vLLM's router kernels, chosen by the batch", covered=False)
    weight = module.weight
    if is_fp8:
        scales = getattr(module, "weight_scale_inv", None)
        refusal = fp8_refusal(weight, scales, module.quant_method.weight_block_size)
        if refusal is not None:
            return Layer(name, kind, f"vLLM's {method}: {refusal}", covered=False)
        return Layer(name, kind, "ndcheck block_fp8", "block_fp8", weight=weight, module=module)
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return Layer(name, kind, f"nothing: {weight.dtype}", covered=False)
    return Layer(name, kind, f"ndcheck {op}", op, weight=weight)


def _output(name: str, module: Any, head_dtype: torch.dtype) -> Layer:
    layer = _product(name, module, "output")
    # Of other weights than plain ones vLLM takes no other dtype.
    if layer.op != "output" or head_dtype == module.weight.dtype:
        return layer
    return Layer(name, layer.kind, f"torch's product in {head_dtype} (head_dtype)", covered=False)


def _attention(name: str, module: Any) -> Layer:
    kind, backend = kind_of(module), module.attn_backend.get_name()
    if backend not in ATTENTION:
        return Layer(name, kind, f"vLLM's {backend}", covered=False)
    if module.kv_cache_dtype not in ("auto", "bfloat16", "float16"):
        return Layer(name, kind, f"a cache in {module.kv_cache_dtype}", covered=False)
    if (version := module.impl.vllm_flash_attn_version) != VERSION:
        return Layer(name, kind, f"vLLM's FlashAttention {version}", covered=False)
    if module.attn_backend.get_builder_cls().build is not attention_step:
        return Layer(name, kind, f"vLLM's {backend}, its kernel chosen by the step", covered=False)
    if module.sliding_window is not None and has_kernels_by_window(module.head_size):
        by = f"vLLM's {backend}, its kernel chosen by windows of {module.head_size} dimensions"
        return Layer(name, kind, by, covered=False)
    return Layer(name, kind, f"vLLM's {backend} in one split, by one kernel")


def _experts(name: str, module: Any) -> Layer:
    kind, method = kind_of(module), kind_of(module.quant_method)
    own = getattr(getattr(module.quant_method, "moe_kernel", None), "fused_experts", None)
    methods = ("UnquantizedFusedMoEMethod", "Fp8MoEMethod")
    if method not in methods or kind_of(own) != "TritonExperts":
        return Layer(name, kind, f"vLLM's {kind_of(own)} of {method}", covered=False)
    refusal = experts_refusal(
        own,
        {
            "w1": module.w13_weight,
            "w2": module.w2_weight,
            "activation": module.activation,
            "expert_map": module.expert_map,
            "apply_router_weight_on_input": module.apply_router_weight_on_input,
        },
    )
    if refusal is not None:
        return Layer(name, kind, f"vLLM's TritonExperts: {refusal}", covered=False)
    by = "ndcheck experts" if method == methods[0] else "ndcheck experts in FP8"
    return Layer(name, kind, by, "experts", weight=module.w13_weight, module=module)


def _norm(module: Any, config: Any) -> tuple[str, bool]:
    """vLLM's own kernel takes a row each; Inductor's order may follow what it compiled for."""
    forward = module._forward_method.__name__
    if forward == "forward_cuda":
        return "vLLM's rms_norm_batch_invariant", True
    compilation, own = config.compilation_config, config.kernel_config.ir_op_priority
    one_for_all = (
        getattr(compilation.mode, "name", "") == "VLLM_COMPILE"
        and compilation.backend == "inductor"
        and not compilation.compile_sizes
        and len(compilation.get_compile_ranges()) == 1
        and all([*ops][:1] == ["native"] for ops in (own.rms_norm, own.fused_add_rms_norm))
    )
    if forward == "forward_native" and one_for_all:
        return "Inductor, one kernel for every number of tokens", True
    return f"{forward}, which may follow the number of tokens", False


def mark(model: Any, layers: Iterable[Layer]) -> None:
    """Let the FP8 linear layers of a model that are covered come to our op."""
    for layer in layers:
        if layer.op == "block_fp8" and layer.covered:
            setattr(model.get_submodule(layer.name), COVERED, True)


def uncovered(layers: Iterable[Layer]) -> list[Layer]:
    return [layer for layer in layers if not layer.covered]


def never_ran(layers: Iterable[Layer], weights_seen: set[int]) -> list[Layer]:
    """Layers whose op was never called with their weights: something else computed them."""
    return [
        layer
        for layer in layers
        if layer.weight is not None and layer.weight.data_ptr() not in weights_seen
    ]


def name_some(layers: Iterable[Layer]) -> str:
    """The first three by name and class, and how many more."""
    listed = [f"{layer.name} ({layer.kind}: {layer.by})" for layer in layers]
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def table(layers: Iterable[Layer]) -> str:
    """Every layer by its name without numbers, how often it is there, and what computes it."""
    counts = Counter(
        (re.sub(r"\.\d+(?=\.|$)", ".*", layer.name), layer.kind, layer.by, layer.covered)
        for layer in layers
    )
    rows = [
        (name or "(model)", str(n), kind, by if covered else f"NOT COVERED: {by}")
        for (name, kind, by, covered), n in counts.items()
    ]
    rows.insert(0, ("layer", "n", "kind", "computed by"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )
