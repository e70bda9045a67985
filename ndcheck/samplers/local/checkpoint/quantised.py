"""Quantised weights: what a config says of them, what is measured as it is, and what is refused.

FP8 in blocks of 128 x 128 stays FP8, on a CPU too, where transformers would dequantise it unasked.
The stock arm is what transformers computes: on CUDA its FP8 kernels, on a CPU the dequantised
weights. Integers of 4 and 8 bits (`packed`) stay packed, and the stock arm is torch's product with
the dequantised weights; alone it is transformers' own, where that can load them. Everything else is
refused where the invariant arm is asked for, and named.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from ndcheck.errors import UsageError
from ndcheck.records import RunSpec
from ndcheck.samplers.local.checkpoint.packed import (
    METHODS,
    PackedLayout,
    put_packed_layers,
    read_packed,
)

FP8 = "fp8"
_DEQUANTISED_BY = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""transformers' config whose ``dequantize`` makes plain weights, by the method's name."""
_LAYERS = ("FP8Linear", "FP8Experts")


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint's weights are stored, as its config says."""

    method: str
    layout: str
    """As a message names it."""
    is_covered: bool
    """Whether the invariant arm has kernels for it."""
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
        return Quantisation(method, read.label, True, read)
    if method != FP8:
        bits = said.get("bits")
        return Quantisation(method, f"{method} of {bits} bits" if bits else method, False)
    size = said.get("weight_block_size", (128, 128))
    scheme, form = said.get("activation_scheme", "dynamic"), said.get("scale_fmt") or "float"
    layout = "FP8 with one scale a tensor" if not size else f"FP8 in blocks of {size!r:.20}"
    layout += f", {scheme} rows" + (f", {form} scales" if form != "float" else "")
    blocks = isinstance(size, list | tuple) and list(size) == [128, 128]
    is_plain = scheme == "dynamic" and form == "float" and said.get("expert_dtype", FP8) == FP8
    return Quantisation(method, layout, bool(blocks and is_plain))


def _said(config: Any) -> Any:
    for each in (config, config.get_text_config(decoder=True)):
        if (said := getattr(each, "quantization_config", None)) is not None:
            return said if isinstance(said, dict) else getattr(said, "to_dict", lambda: said)()
    return None


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
    is_drawn = spec.random_weights is not None and spec.arms == ("invariant",)
    is_cut = spec.tensor_parallel > 1 or spec.tp_groups is not None
    if found is not None and found.packed is not None and is_cut:
        option = f"--tp {spec.tensor_parallel}" if spec.tensor_parallel > 1 else "--tp-groups"
        raise UsageError(f"{option}: {found.layout} is not cut into parts: --dequantise")
    if found is not None and spec.tensor_parallel > 1 and not (found.is_covered and is_drawn):
        raise UsageError(
            f"--tp {spec.tensor_parallel}: ranks share FP8 in blocks of 128 x 128 only, from "
            "--random-weights and with --kernels invariant; --dequantise shares it as bf16"
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


def loading_options(found: Quantisation | None, spec: RunSpec) -> dict[str, Any]:
    """What `from_pretrained` needs beside, to make plain weights where that is asked for."""
    if found is None or not spec.dequantise or found.method not in _DEQUANTISED_BY:
        return {}
    kind = getattr(transformers, _DEQUANTISED_BY[found.method])
    return {"quantization_config": kind(dequantize=True)}


def forget_quantisation(config: Any) -> None:
    """Let ``config`` describe plain weights."""
    for each in (config, config.get_text_config(decoder=True)):
        if hasattr(each, "quantization_config"):
            del each.quantization_config


@contextmanager
def kept_fp8() -> Iterator[None]:
    """Let transformers keep FP8 weights as they are, whatever the device."""
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    class Kept(FineGrainedFP8HfQuantizer):  # type: ignore[misc]
        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            """Its own makes plain weights of them where there is no GPU."""

    own = auto.AUTO_QUANTIZER_MAPPING[FP8]
    auto.AUTO_QUANTIZER_MAPPING[FP8] = Kept
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING[FP8] = own


def put_layers(model: Any, found: Quantisation) -> None:
    """Give a model on the meta device the layers that its config's covered weights go into."""
    if found.packed is not None:
        put_packed_layers(model, found.packed)
        return
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    said = AutoQuantizationConfig.from_dict(dict(_said(model.config)))
    with kept_fp8():
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
    from ndcheck_kernels.ops.block_fp8 import quantise_weight

    for name, weight in module.named_parameters(recurse=False):
        scales = getattr(module, f"{name}_scale_inv", None)
        if scales is None:
            if not name.endswith("_scale_inv"):
                weight.data.zero_()
            continue
        for codes, block in zip(_matrices(weight.data), _matrices(scales.data), strict=True):
            drawn = torch.randn(codes.shape, device=codes.device) * std
            quantised = quantise_weight(drawn)
            codes.copy_(quantised[0])
            block.copy_(quantised[1])


def _matrices(stacked: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (stacked,) if stacked.dim() == 2 else stacked.unbind()


def prepare_stock(model: Any, device: torch.device, spec: RunSpec, source: str) -> None:
    """Make the stock arm of a model with FP8 layers what transformers computes on ``device``.

    Raises UsageError where transformers' kernels are asked for and not there.
    """
    if not has_fp8_layers(model) or spec.tensor_parallel > 1:
        return
    if device.type == "cpu":
        _dequantise_in_use(model)
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
    """What the stock arm of a model with packed integers is."""
    from ndcheck_kernels.models.weight_only import is_packed

    if "stock" not in arms or not any(map(is_packed, model.modules())):
        return ()
    return ("stock arm: torch's products with weights dequantised for each of them",)


@contextmanager
def dequantised_layers(model: Any) -> Iterator[None]:
    """Compute a model's FP8 layers with plain weights, made of the stored ones for each product."""
    layers, experts = _fp8_layers(model), model.config._experts_implementation
    own = [dict(layer.__dict__) for layer in layers]
    try:
        if layers:
            _dequantise_in_use(model)
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


def _dequantise_in_use(model: Any) -> None:
    model.set_experts_implementation("eager")  # The one that calls a module's `linear`.
    for layer in _fp8_layers(model):
        if type(layer).__name__ == "FP8Linear":
            layer.forward = partial(_dequantised_linear, layer)
        else:
            layer.linear = _dequantised_product


def _dequantised_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return _dequantised_product(x, layer.weight, layer.weight_scale_inv, layer.bias)


def _dequantised_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation_scale: None = None,
) -> torch.Tensor:
    """As if `Fp8Dequantize` had made the weight plain while it was loaded."""
    from ndcheck_kernels.ops.block_fp8 import dequantise

    return F.linear(x, dequantise(weight, scales, x.dtype), bias)
