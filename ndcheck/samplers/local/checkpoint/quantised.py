"""Quantised weights: what a config says of them, what is measured as it is, and what is refused.

FP8 stays FP8, on a CPU too, where transformers would dequantise it unasked: in blocks of 128 x 128,
or with a scale a tensor or an output. The stock arm is what transformers computes: on CUDA its FP8
kernels, or torch's scaled product by rows, on a CPU and on ranks (`shared_fp8`) the dequantised
weights. Integers of 4 and 8 bits (`packed`) stay packed, and the stock arm is torch's product with
the dequantised weights; alone it is transformers' own, where that can load them. Everything else is
refused where the invariant arm is asked for, and named.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from ndcheck.errors import UsageError
from ndcheck.records import RunSpec
from ndcheck.samplers.local.checkpoint.fp8_layouts import FP8, as_fp8, kept_fp8
from ndcheck.samplers.local.checkpoint.packed import (
    METHODS,
    PackedLayout,
    put_packed_layers,
    read_packed,
)
from ndcheck.samplers.local.checkpoint.shared_fp8 import share_stock_products

_DEQUANTISED_BY = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""transformers' config whose ``dequantize`` makes plain weights, by the method's name."""
_LAYERS = ("FP8Linear", "FP8Experts")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CACHE_SCALE = re.compile(
    r"\.([qkv]|kv|prob)_(scale|zero_point)$|\.[qkv]_proj\.output_scale$|\.prob_output_scale$"
)
"""How tools name the scales of keys, values, queries and weights in attention."""
_CACHE_SAID = ("kv_cache_scheme", "kv_cache_quant_algo")
_DRAWN_ROW = 16.0
"""The largest magnitude of a row that a drawn scale, in calibration's place, lets through."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint's weights are stored, as its config says."""

    method: str
    layout: str
    """As a message names it."""
    is_covered: bool
    """Whether the invariant arm has kernels for it."""
    has_blocks: bool = False
    """Whether FP8 has a scale a block."""
    packed: PackedLayout | None = None
    """How integers are packed that are read here."""


def read_quantisation(config: Any) -> Quantisation | None:
    """What ``config`` says; None where the weights are plain."""
    said = _said(config)
    if said is None:
        return None
    if not isinstance(said, dict):
        return Quantisation("unknown", f"quantised in an unknown way ({said!r:.40})", False)
    method = _method(said)
    if method in METHODS:
        read = read_packed(said)
        if isinstance(read, str):
            return Quantisation(method, read, False)
        return Quantisation(method, read.label, True, packed=read)
    if method != FP8:
        bits = said.get("bits")
        return Quantisation(method, f"{method} of {bits} bits" if bits else method, False)
    size = said.get("weight_block_size", (128, 128))
    scheme, form = said.get("activation_scheme", "dynamic"), said.get("scale_fmt") or "float"
    owner = "an output" if said.get("weight_scales") == "channel" else "a tensor"
    layout = f"FP8 with one scale {owner}" if not size else f"FP8 in blocks of {size!r:.20}"
    layout += f", {scheme} rows" + (f", {form} scales" if form != "float" else "")
    blocks = isinstance(size, list | tuple) and list(size) == [128, 128]
    is_plain = form == "float" and said.get("expert_dtype", FP8) == FP8
    covered = (blocks and scheme == "dynamic") or (size is None and scheme in ("dynamic", "static"))
    return Quantisation(method, layout, bool(covered and is_plain), has_blocks=bool(size))


def _said(config: Any) -> Any:
    for each in (config, config.get_text_config(decoder=True)):
        if (said := getattr(each, "quantization_config", None)) is not None:
            plain = said if isinstance(said, dict) else getattr(said, "to_dict", lambda: said)()
            if not isinstance(plain, dict):
                return plain
            return as_fp8(plain, has_experts=_has_experts(config)) or plain
    return None


def _has_experts(config: Any) -> bool:
    text = config.get_text_config(decoder=True)
    return any(getattr(text, name, None) for name in _EXPERT_COUNTS)


def _method(said: dict[str, Any]) -> str:
    for bits in (4, 8):
        if said.get(f"load_in_{bits}bit"):
            return f"bitsandbytes {bits} bit"
    method = said.get("quant_method")
    return str(getattr(method, "value", method) or "unknown")


def check_quantisation(source: str, found: Quantisation | None, spec: RunSpec) -> None:
    """Raise UsageError for what cannot run as asked, naming what would."""
    if spec.dequantise:
        if found is None:
            raise UsageError(f"--dequantise: the weights of {source} are not quantised")
        is_readable = found.method in _DEQUANTISED_BY or found.packed is not None
        if not is_readable and spec.random_weights is None:
            raise UsageError(
                f"--dequantise: {source} is {found.layout}, of which no plain weights can be made "
                f"here (of {', '.join(_DEQUANTISED_BY)} and integers in groups they can); save it "
                "as bf16 or as FP8 in blocks of 128 x 128"
            )
        return
    is_drawn = spec.random_weights is not None
    is_shared = found is not None and found.is_covered and found.has_blocks and is_drawn
    is_cut = spec.tensor_parallel > 1 or spec.tp_groups is not None
    if found is not None and found.packed is not None and is_cut:
        option = f"--tp {spec.tensor_parallel}" if spec.tensor_parallel > 1 else "--tp-groups"
        raise UsageError(f"{option}: {found.layout} is not cut into parts: --dequantise")
    if found is not None and spec.tensor_parallel > 1 and not is_shared:
        raise UsageError(
            f"--tp {spec.tensor_parallel}: ranks share FP8 in blocks of 128 x 128 only, and from "
            "--random-weights; --dequantise shares it as bf16"
        )
    if found is None or found.is_covered:
        return
    is_random = spec.random_weights is not None
    if not is_random and "invariant" not in spec.arms:
        return
    ways = []
    if is_random or found.method in _DEQUANTISED_BY:
        ways.append("--dequantise computes it as bf16")
    if not is_random:
        ways.append("--kernels stock runs it as transformers does")
    lacking = "--random-weights draws no" if is_random else "no batch-invariant kernel reads"
    raise UsageError(f"--model {source}: {lacking} {found.layout}: {', '.join(ways)}")


def warn_of_cache(config: Any, left_over: list[str], spec: RunSpec) -> None:
    """Say that a quantised cache is not followed, which a server takes from the checkpoint."""
    scales = [name for name in left_over if _CACHE_SCALE.search(name)]
    said = getattr(config, "quantization_config", None)
    asked = [n for n in _CACHE_SAID if isinstance(said, dict) and said.get(n)]
    if found := scales or asked:
        is_fp8 = spec.kv_cache_dtype == "fp8"
        log.warning(
            "its quantised cache (%s) is not followed: keys and values are %s",
            found[0],
            "e4m3 without scales" if is_fp8 else "of the model's dtype (--kv-cache-dtype)",
        )


def loading_options(config: Any, found: Quantisation | None, spec: RunSpec) -> dict[str, Any]:
    """What `from_pretrained` needs beside: whose words to read, whether to make plain weights."""
    if found is None or found.method not in _DEQUANTISED_BY:
        return {}
    if found.method == FP8:
        said = copy.deepcopy(config)
        forget_quantisation(said)
        said.quantization_config = {**_said(config), "dequantize": spec.dequantise}
        return {"config": said}
    kind = getattr(transformers, _DEQUANTISED_BY[found.method])
    return {"quantization_config": kind(dequantize=True)} if spec.dequantise else {}


def forget_quantisation(config: Any) -> None:
    """Let ``config`` describe plain weights."""
    for each in (config, config.get_text_config(decoder=True)):
        if hasattr(each, "quantization_config"):
            del each.quantization_config


def put_layers(model: Any, found: Quantisation) -> None:
    """Give a model on the meta device the layers that its config's covered weights go into."""
    if found.packed is not None:
        put_packed_layers(model, found.packed)
        return
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    with kept_fp8():
        said = AutoQuantizationConfig.from_dict(dict(_said(model.config)))
        AutoHfQuantizer.from_config(said, pre_quantized=True).preprocess_model(model)


def is_fp8_layer(module: torch.nn.Module) -> bool:
    return type(module).__name__ in _LAYERS


def draw_layer(module: torch.nn.Module, std: float) -> bool:
    """Fill a quantised layer with quantised normal numbers; False where it is another one."""
    from ndcheck_kernels.models.weight_only import draw, is_packed

    if is_packed(module):
        draw(module, std)
        return True
    if not is_fp8_layer(module):
        return False
    _draw_fp8(module, std)
    return True


def _draw_fp8(module: torch.nn.Module, std: float) -> None:
    """Fill an FP8 layer with quantised normal numbers, one matrix at a time; its biases with 0."""
    from ndcheck_kernels.ops import block_fp8, row_fp8

    for name, weight in module.named_parameters(recurse=False):
        scales = getattr(module, f"{name}_scale_inv", None)
        if name.endswith("activation_scale"):
            weight.data.fill_(_DRAWN_ROW / block_fp8.LARGEST)
        elif scales is None:
            if not name.endswith("_scale_inv"):
                weight.data.zero_()
        else:
            whole = scales.data if weight.dim() == 3 else scales.data[None]
            for codes, own in zip(_matrices(weight.data), whole, strict=True):
                drawn = torch.randn(codes.shape, device=codes.device) * std
                quantised = (
                    row_fp8.quantise_weight(drawn, own.numel())
                    if module.block_size is None
                    else block_fp8.quantise_weight(drawn)
                )
                codes.copy_(quantised[0])
                own.copy_(quantised[1].view(own.shape))


def _matrices(stacked: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (stacked,) if stacked.dim() == 2 else stacked.unbind()


def prepare_stock(model: Any, device: torch.device, spec: RunSpec, source: str) -> None:
    """Make the stock arm of a model with FP8 layers what transformers computes on ``device``.

    Raises UsageError where transformers' kernels are asked for and not there.
    """
    if not has_fp8_layers(model):
        return
    if spec.tensor_parallel > 1:
        share_stock_products(model, _fp8_layers(model))
        return
    if device.type == "cpu":
        _put_products(model, _dequantised_product)
    elif all(layer.block_size is None for layer in _fp8_layers(model)):
        _put_products(model, _scaled_product)
    elif "stock" in spec.arms:
        try:
            from transformers.integrations.finegrained_fp8 import load_finegrained_fp8_kernel

            load_finegrained_fp8_kernel()
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(
                f"--model {source}: the stock arm needs transformers' FP8 kernels, which the "
                f"`kernels` package downloads ({reason:.160}): --kernels invariant runs without"
            ) from error


def stored_by_us(found: Quantisation | None, spec: RunSpec) -> PackedLayout | None:
    """How integers are packed, if they are read here: transformers' own need their packages."""
    if found is None or found.packed is None:
        return None
    if spec.dequantise:
        return None if found.method in _DEQUANTISED_BY else found.packed
    alone = spec.arms == ("stock",)
    return None if alone and _transformers_reads(found.method) else found.packed


def _transformers_reads(method: str) -> bool:
    from transformers.utils import import_utils

    if method in _DEQUANTISED_BY:
        return True  # Where it has no kernels it makes plain weights.
    package = {"gptq": "gptqmodel", "awq": "gptqmodel"}.get(method, "compressed_tensors")
    return bool(getattr(import_utils, f"is_{package}_available", lambda: False)())


def stock_notes(model: Any, arms: tuple[str, ...]) -> tuple[str, ...]:
    """What the stock arm of a model with packed integers, or with FP8 on ranks, is."""
    from ndcheck_kernels.models.tensor_parallel import is_shared
    from ndcheck_kernels.models.weight_only import is_packed

    is_spread = has_fp8_layers(model) and is_shared(model)
    if "stock" not in arms or not (is_spread or any(map(is_packed, model.modules()))):
        return ()
    return ("stock arm: torch's products with weights dequantised for each of them",)


@contextmanager
def dequantised_layers(model: Any) -> Iterator[None]:
    """Compute a model's FP8 layers with plain weights, made of the stored ones for each product.

    On ranks they are computed so anyway.
    """
    from ndcheck_kernels.models.tensor_parallel import is_shared

    layers = [] if is_shared(model) else _fp8_layers(model)
    experts = model.config._experts_implementation
    own = [dict(layer.__dict__) for layer in layers]
    try:
        if layers:
            _put_products(model, _dequantised_product)
        yield
    finally:
        for layer, attributes in zip(layers, own, strict=True):
            layer.__dict__.clear()
            layer.__dict__.update(attributes)
        if layers:
            model.set_experts_implementation(experts)


def has_fp8_layers(model: Any) -> bool:
    return bool(_fp8_layers(model))


def _fp8_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if is_fp8_layer(module)]


def _put_products(model: Any, product: Callable[..., torch.Tensor]) -> None:
    model.set_experts_implementation("eager")  # The one that calls a module's `linear`.
    for layer in _fp8_layers(model):
        if type(layer).__name__ == "FP8Linear":
            layer.forward = partial(_forward, layer, product)
        else:
            layer.linear = partial(product, layer)


def _forward(layer: Any, product: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return product(
        layer, x, layer.weight, layer.weight_scale_inv, layer.bias, layer.activation_scale
    )


def _dequantised_product(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As if `Fp8Dequantize` had made the weight plain while it was loaded."""
    from ndcheck_kernels.ops import block_fp8, row_fp8

    if layer.block_size is None:
        return F.linear(x, row_fp8.dequantise(weight, scales.reshape(-1), x.dtype), bias)
    return F.linear(x, block_fp8.dequantise(weight, scales, x.dtype), bias)


def _scaled_product(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """What transformers computes where it keeps such weights: torch's scaled product by rows."""
    from ndcheck_kernels.models.quantised import ROW_BOUND
    from ndcheck_kernels.ops.row_fp8 import UNBOUNDED, quantise_rows

    rows = x.reshape(-1, x.shape[-1])
    given = None if activation_scale is None else activation_scale.reshape(1).expand(len(rows))
    codes, row_scales = quantise_rows(rows, given, getattr(layer, ROW_BOUND, UNBOUNDED))
    by_output = scales.reshape(-1).repeat_interleave(len(weight) // scales.numel())
    out = torch._scaled_mm(
        codes, weight.t(), row_scales[:, None], by_output[None], out_dtype=torch.bfloat16
    )
    out = out.to(x.dtype).view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias
