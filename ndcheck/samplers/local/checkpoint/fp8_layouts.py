"""FP8 checkpoints as several tools publish them, loaded into transformers' FP8 layers.

What compressed-tensors, FBGEMM, ModelOpt and AutoFP8 store is one thing under several names: e4m3
codes, a scale for the tensor or for each output, and perhaps a calibrated one for the rows. Here a
config's words for it become those of transformers' own FP8 method, and tensors its names.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FP8 = "fp8"
_BLOCK = [128, 128]
_FLOATS = ("float-quantized", "naive-quantized")
"""Formats of compressed-tensors that store one code a weight."""


def as_fp8(said: dict[str, Any], *, has_experts: bool = False) -> dict[str, Any] | None:
    """What a config's ``quantization_config`` says, in the words of transformers' FP8 method.

    With one of ours beside: ``weight_scales``, "tensor" or "channel". None where it says something
    else, or what no FP8 layer of transformers' has; of experts only its own method is read.
    """
    kind = said.get("quant_method")
    if has_experts and kind != FP8:
        return None
    found = None
    if kind == "compressed-tensors":
        found = _compressed_tensors(said)
    elif kind == "modelopt":
        found = _modelopt(said)
    elif kind == "fbgemm_fp8":
        bound = said.get("activation_scale_ub")
        found = _layout("channel", "dynamic", _strings(said.get("modules_to_not_convert")))
        found["row_bound"] = float(bound) if isinstance(bound, int | float) and bound else None
    elif kind == FP8 and said.get("activation_scheme") == "static":
        found = {"weight_block_size": None, **said}  # AutoFP8 leaves it out.
    return found


def _layout(
    scales: str, scheme: str, ignored: list[str], block: list[int] | None = None
) -> dict[str, Any]:
    return {
        "quant_method": FP8,
        "activation_scheme": scheme,
        "weight_block_size": block,
        "weight_scales": scales,
        "modules_to_not_convert": ignored,
    }


def _compressed_tensors(said: dict[str, Any]) -> dict[str, Any] | None:
    if said.get("transform_config") or is_sparse(said):
        return None
    groups = said.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    if not isinstance(group, dict) or group.get("targets") != ["Linear"]:
        return None
    weights, rows = _fp8(group.get("weights")), _fp8(group.get("input_activations"))
    if weights is None or rows is None or group.get("output_activations"):
        return None
    if (group.get("format") or said.get("format")) not in _FLOATS:
        return None
    ignored = [
        name[3:] if name.startswith("re:") else f"{re.escape(name)}$"
        for name in _strings(said.get("ignore"))
    ]
    is_dynamic, by = bool(rows.get("dynamic")), (weights.get("strategy"), rows.get("strategy"))
    if by == ("block", "group") and weights.get("block_structure") == _BLOCK:
        fits = is_dynamic and rows.get("group_size") == _BLOCK[1]
        return _layout("block", "dynamic", ignored, _BLOCK) if fits else None
    if by[0] in ("tensor", "channel") and by[1] == ("token" if is_dynamic else "tensor"):
        return _layout(str(by[0]), "dynamic" if is_dynamic else "static", ignored)
    return None


def is_sparse(said: dict[str, Any]) -> bool:
    """Does compressed-tensors leave out zeros of what it stores?"""
    sparse = said.get("sparsity_config") or {}
    return not isinstance(sparse, dict) or sparse.get("format", "dense") != "dense"


def _fp8(said: Any) -> dict[str, Any] | None:
    is_it = isinstance(said, dict) and (said.get("type"), said.get("num_bits")) == ("float", 8)
    return said if is_it else None


def _modelopt(said: dict[str, Any]) -> dict[str, Any] | None:
    ignored = _strings(said.get("ignore", said.get("exclude_modules")))
    if said.get("quant_algo") != "FP8":
        return None
    return _layout("tensor", "static", [fnmatch.translate(name) for name in ignored])


def _strings(said: Any) -> list[str]:
    return [each for each in said if isinstance(each, str)] if isinstance(said, list) else []


@contextmanager
def kept_fp8() -> Iterator[None]:
    """Let transformers keep FP8 weights as they are, whatever the device and the tool's names."""
    from transformers.quantizers import auto

    config, quantizer = _classes()
    own = auto.AUTO_QUANTIZER_MAPPING[FP8], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[FP8]
    auto.AUTO_QUANTIZER_MAPPING[FP8] = quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[FP8] = config
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING[FP8], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[FP8] = own


def _classes() -> tuple[type, type]:
    from transformers import FineGrainedFP8Config
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    class Said(FineGrainedFP8Config):  # type: ignore[misc]
        def __init__(
            self,
            weight_scales: str = "tensor",
            row_bound: float | None = None,
            **others: Any,
        ) -> None:
            super().__init__(**others)
            self.weight_scales, self.row_bound = weight_scales, row_bound

    class Flat(ConversionOps):  # type: ignore[misc]
        """A scale has as many dimensions as its tool likes."""

        def convert(
            self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **_: Any
        ) -> dict[str, Any]:
            (found,) = input_dict.values()
            scale = found[0] if isinstance(found, list) else found
            return {target_patterns[0]: scale.float().reshape(-1)}

    class Kept(FineGrainedFP8HfQuantizer):  # type: ignore[misc]
        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            """Its own makes plain weights of them where there is no GPU."""

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            super()._process_model_before_weight_loading(model, **kwargs)
            said = self.quantization_config
            layers = list(model.modules())
            self.has_experts = any(type(layer).__name__ == "FP8Experts" for layer in layers)
            if said.weight_block_size is None and not self.has_experts:
                for layer in layers:
                    if type(layer).__name__ == "FP8Linear":
                        _flatten_scales(layer, said)

        def update_weight_conversions(self, conversions: list[Any], *model: Any) -> list[Any]:
            said = self.quantization_config
            names = {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"}
            own: list[Any] = []
            if said.weight_block_size is not None or said.dequantize or self.has_experts:
                own = [WeightRenaming(rf"\.{old}$", f".{new}") for old, new in names.items()]
            else:
                for old, new in names.items():
                    own += [WeightConverter(f"{name}$", new, [Flat()]) for name in (old, new)]
            updated: list[Any] = super().update_weight_conversions(conversions, *model)
            return [*own, *updated]

    return Said, Kept


def _flatten_scales(layer: Any, said: Any) -> None:
    """Scales of an FP8 layer without blocks as [S], which `ops.row_fp8` takes and files give."""
    sizes = {"weight_scale_inv": layer.out_features if said.weight_scales == "channel" else 1}
    if layer.activation_scale is not None:
        sizes["activation_scale"] = 1
    for name, size in sizes.items():
        # Not of the default dtype, which is the model's while it is built.
        scale = torch.empty(size, dtype=torch.float32, device="meta")
        setattr(layer, name, torch.nn.Parameter(scale, requires_grad=False))
    if said.row_bound is not None:
        from ndcheck_kernels.models.quantised import ROW_BOUND

        setattr(layer, ROW_BOUND, said.row_bound)
