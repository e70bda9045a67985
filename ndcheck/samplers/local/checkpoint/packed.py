"""Weights of 4 and 8 bits as compressed-tensors, GPTQ, AWQ and gpt-oss (MXFP4) publish them, read
without their packages.

transformers loads the tensors into layers that have their names, sizes and dtypes, and nothing
else; then each becomes a `WeightOnlyLinear`, or a plain layer. A column's group is what the
checkpoint says, so that reordered columns (GPTQ's `desc_act`) keep their places.

Formats: compressed_tensors/compressors/pack_quantized (github.com/vllm-project/compressed-tensors),
auto_gptq/nn_modules/qlinear (github.com/AutoGPTQ/AutoGPTQ), awq/modules/linear/gemm.py
(github.com/casper-hansen/AutoAWQ).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ndcheck.samplers.local.checkpoint.fp8_layouts import is_sparse

COMPRESSED, GPTQ, AWQ, MXFP4 = "compressed-tensors", "gptq", "awq", "mxfp4"
METHODS = (COMPRESSED, GPTQ, AWQ, MXFP4)
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""In which half byte of an int32 AWQ keeps each of 8 neighbouring columns."""
_HEAD = "lm_head"
_EXPERTS = ("GptOssExperts",)
"""Those that are published in MXFP4."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some layers are stored."""

    bits: int
    group_size: int
    """Columns that share a scale; -1 for all of a row."""
    is_symmetric: bool
    targets: tuple[str, ...] = ("Linear",)
    """Layers that have it: names, classes, or `re:` and an expression. GPTQ: ends of names."""
    has_order: bool = False
    """Whether a column's group is stored."""

    @property
    def label(self) -> str:
        groups = "a scale a row" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.bits} bits in {groups}{'' if self.is_symmetric else ' with zero points'}"


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """What a config says of a checkpoint's integers."""

    method: str
    schemes: tuple[Scheme, ...]
    left_out: tuple[str, ...] = ()
    """Layers that stay plain: as `Scheme.targets`; AWQ: parts of names."""
    zero_offset: int = 0
    """What is added to stored zeros: 1 in GPTQ's first version."""

    @property
    def label(self) -> str:
        if self.method == MXFP4:
            return MXFP4
        return f"{self.method} of {', '.join(scheme.label for scheme in self.schemes)}"

    def scheme_of(self, path: str, module: torch.nn.Module) -> Scheme | None:
        """That of a layer; None where it is plain."""
        if type(module) is not torch.nn.Linear:
            return None
        if self.method == COMPRESSED:
            if any(_matches(path, module, each) for each in self.left_out):
                return None
            kind = type(module).__name__
            found = {t: s for s in self.schemes for t in s.targets if _matches(path, module, t)}
            # A layer's name goes before an expression, and that before a class.
            first = min(found, key=lambda t: (t == kind, t.startswith("re:"), t), default="")
            return found.get(first)
        if self.method == MXFP4:
            return None
        (scheme,) = self.schemes
        if any(part in path for part in self.left_out):
            return None
        is_meant = scheme.targets == ("Linear",) or path.endswith(scheme.targets)
        return scheme if is_meant else None


def _matches(path: str, module: torch.nn.Module, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), path) is not None
    return pattern in (path, type(module).__name__)


def read_packed(said: dict[str, Any]) -> PackedLayout | str:
    """The layout that a config's ``quantization_config`` describes, or the name of another one."""
    method = said.get("quant_method")
    if method == MXFP4:
        return PackedLayout(MXFP4, ())
    try:
        if method == COMPRESSED:
            return _read_compressed(said)
        return _read_gptq(said) if method == GPTQ else _read_awq(said)
    except (TypeError, ValueError, KeyError, AttributeError, re.error):
        return f"{method} with settings that are not known here"


def _read_compressed(said: dict[str, Any]) -> PackedLayout | str:
    schemes = []
    groups = said.get("config_groups") or {}
    formats = {said.get("format"), *(g.get("format") for g in groups.values())} - {None}
    if said.get("transform_config") or is_sparse(said):
        return f"{COMPRESSED} with transforms or sparse weights"
    if formats != {"pack-quantized"} or not groups:
        return f"{COMPRESSED} as {', '.join(sorted(map(str, formats))) or 'an unknown format'}"
    for group in groups.values():
        weights = group["weights"]
        if group.get("input_activations") or group.get("output_activations"):
            return f"{COMPRESSED} with quantised activations"
        size = {"group": weights.get("group_size"), "channel": -1}.get(weights.get("strategy"))
        if weights.get("type", "int") != "int" or weights.get("dynamic") or size is None:
            return f"{COMPRESSED} with weights of another kind than integers in groups or rows"
        is_symmetric, targets = weights.get("symmetric", True), tuple(map(str, group["targets"]))
        has_order = str(weights.get("actorder")).lower() in ("group", "dynamic", "true")
        schemes.append(_scheme(weights.get("num_bits"), size, is_symmetric, targets, has_order))
    left_out = tuple(map(str, said.get("ignore") or ()))
    for pattern in (*left_out, *(t for s in schemes for t in s.targets)):
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    return PackedLayout(COMPRESSED, tuple(schemes), left_out)


def _read_gptq(said: dict[str, Any]) -> PackedLayout | str:
    version = said.get("checkpoint_format") or said.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        return f"gptq in the format {version!r:.20}"
    if said.get("dynamic"):
        return "gptq with settings of single layers (dynamic)"
    inside = said.get("modules_in_block_to_quantize")
    names = tuple(str(name) for part in inside for name in part) if inside else ("Linear",)
    scheme = _scheme(
        said.get("bits"), said.get("group_size", 128), said.get("sym", True), names, True
    )
    left_out = () if said.get("lm_head") else (_HEAD,)
    return PackedLayout(GPTQ, (scheme,), left_out, zero_offset=int(version == "gptq"))


def _read_awq(said: dict[str, Any]) -> PackedLayout | str:
    version = str(said.get("version") or said.get("format") or "gemm").lower()
    if version != "gemm" or said.get("zero_point", True) is not True or said.get("bits") != 4:
        return f"awq of {said.get('bits')!r:.9} bits, version {version:.20}, or without zero points"
    left_out = (_HEAD, *map(str, said.get("modules_to_not_convert") or ()))
    return PackedLayout(AWQ, (_scheme(4, said.get("group_size", 128), False),), left_out)


def _scheme(
    bits: Any, group_size: Any, is_symmetric: Any, targets: tuple[str, ...] = ("Linear",),
    has_order: bool = False,
) -> Scheme:  # fmt: skip
    if (
        bits not in (4, 8)
        or type(group_size) is not int
        or not (group_size == -1 or group_size > 0)
    ):
        raise ValueError
    return Scheme(bits, group_size, bool(is_symmetric), targets, has_order)


def put_packed_layers(model: Any, layout: PackedLayout) -> None:
    """Give a model on the meta device the layers that its integers go into, in their own form."""
    from ndcheck_kernels.models.weight_only import WeightOnlyLinear

    _pack_experts(model, layout)
    for path, linear, scheme in list(_quantised(model, layout)):
        size = _group_size(path, linear, scheme)
        made = WeightOnlyLinear.empty(linear, scheme.bits, size, is_symmetric=scheme.is_symmetric)
        model.set_submodule(path, made)


def _pack_experts(model: Any, layout: PackedLayout) -> None:
    from ndcheck_kernels.models.weight_only import pack_experts

    if layout.method != MXFP4:
        return
    found = [module for module in model.modules() if type(module).__name__ in _EXPERTS]
    if not found:
        raise ValueError(f"it has no experts that are read from {layout.label}")
    for experts in found:
        pack_experts(experts)


def _quantised(model: Any, layout: PackedLayout) -> Iterator[tuple[str, torch.nn.Linear, Scheme]]:
    for path, module in model.named_modules():
        is_stacked = any(p.dim() == 3 for p in module.parameters(recurse=False))
        if is_stacked and layout.method != MXFP4:
            raise ValueError(f"no kernel reads experts ({path}) of {layout.label}")
        if (scheme := layout.scheme_of(path, module)) is not None:
            yield path, module, scheme


def _group_size(path: str, linear: torch.nn.Linear, scheme: Scheme) -> int:
    size = linear.in_features if scheme.group_size == -1 else scheme.group_size
    if linear.in_features % size:
        raise ValueError(
            f"groups of {size} do not divide the {linear.in_features} columns of {path}"
        )
    return size


class StoredLinear(torch.nn.Module):
    """The tensors of one layer as a checkpoint has them; it computes nothing."""

    def __init__(
        self, path: str, linear: torch.nn.Linear, scheme: Scheme, layout: PackedLayout
    ) -> None:
        super().__init__()
        self.scheme, self.layout = scheme, layout
        n, k = linear.weight.shape
        self.columns, self.rows = k, n
        size = _group_size(path, linear, scheme)
        groups, words = k // size, 32 // scheme.bits
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        # Wide enough for any scale: they are loaded as what is here.
        integers, floats = torch.int32, torch.float32
        if layout.method == COMPRESSED:
            fields["weight_packed"] = (n, -(-k // words)), integers
            fields["weight_scale"] = (n, groups), floats
            fields["weight_shape"] = (2,), torch.int64
            if not scheme.is_symmetric:
                fields["weight_zero_point"] = (-(-n // words), groups), integers
            if scheme.has_order:
                fields["weight_g_idx"] = (k,), integers
        else:
            if n % words or (layout.method == GPTQ and k % words):
                raise ValueError(f"{path} of {n} x {k} fills no words of {words} numbers")
            by_column = layout.method == GPTQ
            fields["qweight"] = ((k // words, n) if by_column else (k, n // words)), integers
            fields["qzeros"] = (groups, n // words), integers
            fields["scales"] = (groups, n), floats
            if by_column:
                fields["g_idx"] = (k,), integers
        for name, (shape, dtype) in fields.items():
            tensor = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self._shapes = {name: shape for name, (shape, _) in fields.items()}
        self.register_parameter("bias", linear.bias)

    def packed(self, dtype: torch.dtype) -> Any:
        """As `ops.weight_only` has it; scales in the narrowest dtype that holds them.

        Raises ValueError for tensors that contradict each other.
        """
        from ndcheck_kernels.ops.weight_only import Packed, pack

        bits, stored = self.scheme.bits, dict(self.named_parameters())
        for name, shape in self._shapes.items():
            # transformers 5.17 looks at no shape of a quantised checkpoint.
            if stored[name].shape != shape:
                found = tuple(stored[name].shape)
                raise ValueError(f"{name} of {found} has another shape than {shape}")
        zeros: torch.Tensor | None
        if self.layout.method == COMPRESSED:
            codes, scales, zeros = self._read_compressed(stored)
        else:
            codes, scales, zeros = self._read_words(stored)
        order = stored.get("weight_g_idx", stored.get("g_idx"))
        columns = torch.arange(self.columns, device=scales.device)
        if order is not None and (
            bool((order == columns // (self.columns // len(scales))).all()) or int(order[0]) == -1
        ):
            order = None
        if order is not None and (order.min() < 0 or order.max() >= len(scales)):
            raise ValueError(f"a column has a group that is none of the {len(scales)}")
        if zeros is not None and bool((zeros == 1 << (bits - 1)).all()):
            zeros = None
        return Packed(
            pack(codes, bits), _narrowed(scales, dtype).contiguous(),
            None if zeros is None else zeros.to(torch.int16).contiguous(),
            None if order is None else order.to(torch.int32), bits, self.columns,
        )  # fmt: skip

    def _read_compressed(
        self, stored: dict[str, torch.nn.Parameter]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        bits, zeros = self.scheme.bits, None
        if (said := stored["weight_shape"].tolist()) != [self.rows, self.columns]:
            raise ValueError(f"weight_shape is {said}, not {[self.rows, self.columns]}")
        codes = unpack_words(stored["weight_packed"], bits, 1)[:, : self.columns]
        if not self.scheme.is_symmetric:
            zeros = unpack_words(stored["weight_zero_point"], bits, 0)[: self.rows].t()
        return codes, stored["weight_scale"].t(), zeros

    def _read_words(
        self, stored: dict[str, torch.nn.Parameter]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        bits = self.scheme.bits
        codes = unpack_words(stored["qweight"], bits, int(self.layout.method == AWQ))
        # Added to whole words, from which it was taken: a 0 borrowed from the number above it.
        offset = self.layout.zero_offset * (0xFFFFFFFF // (2**bits - 1))
        zeros = unpack_words(stored["qzeros"] + offset, bits, 1).to(torch.int16)
        if self.layout.method == AWQ:
            codes, zeros = (
                t.view(len(t), -1, 8)[..., _AWQ_ORDER].flatten(1) for t in (codes, zeros)
            )
        return codes.t(), stored["scales"], zeros


def unpack_words(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 -> uint8, 32 / bits times as many along ``dim``: a word's low bits come first."""
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = -1
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device).view(shape)
    codes = (words.unsqueeze(dim + 1) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(dim, dim + 1)


def _narrowed(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    for narrow in (dtype, torch.float16, torch.bfloat16):
        if torch.equal(scales.to(narrow).float(), scales):
            return scales.to(narrow)
    return scales


@contextmanager
def stored_layers(layout: PackedLayout | None) -> Iterator[None]:
    """Let transformers load a checkpoint's integers as they are, into `StoredLinear`."""
    if layout is None:
        yield
        return
    found = layout
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, **said: Any) -> None:
            self.__dict__.update(said)

    class Stored(HfQuantizer):  # type: ignore[misc]
        is_trainable = False

        def is_serializable(self) -> bool:
            return False

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            _pack_experts(model, found)
            for path, linear, scheme in list(_quantised(model, found)):
                model.set_submodule(path, StoredLinear(path, linear, scheme, found))

    own = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    auto.AUTO_QUANTIZER_MAPPING = own[0] | {layout.method: Stored}
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING = own[1] | {layout.method: Config}
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING = own


@torch.no_grad()
def make_layers(model: Any, device: torch.device, *, is_plain: bool) -> None:
    """Put layers that compute in the place of stored ones, one at a time, on ``device``.

    Raises ValueError, naming the layer, for tensors that contradict each other.
    """
    from ndcheck_kernels.models.weight_only import WeightOnlyLinear
    from ndcheck_kernels.ops.weight_only import dequantise

    for path, stored in list(model.named_modules()):
        if not isinstance(stored, StoredLinear):
            continue
        try:
            packed = stored.to(device).packed(model.dtype)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        bias = dict(stored.named_parameters()).get("bias")
        made: torch.nn.Module = WeightOnlyLinear(packed, bias)
        if is_plain:
            made = torch.nn.Linear(stored.columns, stored.rows, bias=False, device="meta")
            weight = dequantise(packed, model.dtype)
            made.weight = torch.nn.Parameter(weight, requires_grad=False)
            made.register_parameter("bias", bias)
        model.set_submodule(path, made)
