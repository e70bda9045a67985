"""Linear layers of fused decoder layers: a weight, plain or quantised, and what goes before it.

A plain product reads rows of the model's dtype. One of FP8 reads codes and scales, which the launch
before it writes in the rows' place: RMSNorm, a gate, or in blocks for few rows attention. One of
integers reads plain rows too. All have the bits of the unfused layer's product of the same rows. On
ranks the last product before a residual gives parts of sums, which `add_over_ranks` adds.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ndcheck_kernels.cuda.products.fp8.fp8_matmul import fp8_matmul
from ndcheck_kernels.cuda.products.matmul import matmul
from ndcheck_kernels.cuda.products.weight_only import weight_only_matmul
from ndcheck_kernels.cuda.rows.add_parts import add_parts
from ndcheck_kernels.cuda.rows.quantise import (
    OneScale,
    Quantised,
    quantise_rows,
    rms_norm_quantise,
    silu_mul_quantise,
)
from ndcheck_kernels.cuda.rows.rms_norm import rms_norm
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul
from ndcheck_kernels.models.interface import here
from ndcheck_kernels.models.quantised import is_block_fp8, is_row_fp8, row_bound
from ndcheck_kernels.models.tensor_parallel import Spread
from ndcheck_kernels.models.weight_only import WeightOnlyLinear
from ndcheck_kernels.ops.collectives import adds_whole, gather_parts, sum_over_ranks
from ndcheck_kernels.ops.weight_only import Packed


@dataclass(frozen=True, slots=True)
class Projection:
    """x @ weight.T + bias or another addend."""

    weight: torch.Tensor | Packed
    """[N, K]."""
    bias: torch.Tensor | None
    scales: torch.Tensor | None
    """[N / 128, K / 128] or [N] of FP8 codes; None of a plain weight."""
    one_scale: OneScale | None = None
    """How rows are quantised where the weight has scales [N]."""

    @classmethod
    def of(cls, *layers: Any) -> Projection:
        """Of a linear layer; or of several that meet the same rows, one under the other in memory.

        Their parameters become views of the whole, but for scales that each output gets a copy of;
        of layers on ranks it is this rank's part.
        """
        first = layers[0]
        if isinstance(first, WeightOnlyLinear):
            codes, scales, zeros, bias = (
                None if getattr(first, name) is None else _join(layers, name, dim)
                for name, dim in (("codes", 0), ("scales", 1), ("zeros", 1), ("bias", 0))
            )
            assert codes is not None and scales is not None  # noqa: PT018
            packed = Packed(codes, scales, zeros, first.group_of, first.bits, first.in_features)
            return cls(packed, bias, None)
        fields = ["weight", *(["bias"] if first.bias is not None else [])]
        if is_block_fp8(first):
            fields.append("weight_scale_inv")
        joined = {name: _join(layers, name) for name in fields}
        weight, bias = joined["weight"], joined.get("bias")
        if is_row_fp8(first):
            return cls(
                weight, bias, torch.cat([_by_output(each) for each in layers]), _one_scale(first)
            )
        return cls(weight, bias, joined.get("weight_scale_inv"))

    @property
    def op(self) -> str:
        """As `Scope.fires` counts it."""
        if isinstance(self.weight, Packed):
            return "weight_only_linear"
        if self.scales is None:
            return "linear"
        return "block_fp8_linear" if self.one_scale is None else "row_fp8_linear"

    def __call__(self, rows: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """rows [M, K], addend [M, N] in the bias's place -> [M, N]."""
        if self.scales is None:
            return self._plain(rows, addend)
        return self.of_codes(self._quantised(rows), rows.dtype, addend)

    def after_norm(self, rows: torch.Tensor, norm: Any, width: int | None = None) -> torch.Tensor:
        """Of the rows [M, K] as transformers' RMSNorm module leaves them.

        ``width``: as `matmul` takes it, of a plain weight in blocks of outputs.
        """
        weight = here(norm.weight)
        if self.scales is None:
            return self._plain(rms_norm(rows, weight, norm.variance_epsilon), None, width)
        codes = rms_norm_quantise(rows, weight, norm.variance_epsilon, one_scale=self.one_scale)
        return self.of_codes(codes, rows.dtype, None)

    def after_gate(self, gate_up: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        """Of silu(gate) * up, from gate_up [M, 2 K]."""
        gate, up = gate_up.chunk(2, -1)
        if self.scales is None:
            return self._plain(silu_mul(gate, up), addend)
        codes = silu_mul_quantise(gate, up, one_scale=self.one_scale)
        return self.of_codes(codes, gate.dtype, addend)

    def parts(self, rows: torch.Tensor, n_parts: int) -> torch.Tensor:
        """rows [M, K here] -> [n_parts, M, N] fp32: of K in parts, what each adds to the sum."""
        if self.scales is None:
            return self._plain_parts(rows, n_parts)
        return self._fp8_part(self._quantised(rows))

    def parts_after_gate(self, gate_up: torch.Tensor, n_parts: int) -> torch.Tensor:
        """`parts` of silu(gate) * up, from gate_up [M, 2 K here]."""
        gate, up = gate_up.chunk(2, -1)
        if self.scales is None:
            return self._plain_parts(silu_mul(gate, up), n_parts)
        return self._fp8_part(silu_mul_quantise(gate, up, one_scale=self.one_scale))

    def _quantised(self, rows: torch.Tensor) -> Quantised:
        return quantise_rows(rows, one_scale=self.one_scale)

    def _plain_parts(self, rows: torch.Tensor, n_parts: int) -> torch.Tensor:
        assert not isinstance(self.weight, Packed)
        out = rows.new_empty(n_parts, len(rows), len(self.weight), dtype=torch.float32)
        length = rows.shape[1] // n_parts
        pieces = zip(rows.split(length, 1), self.weight.split(length, 1), out, strict=True)
        for part, weight, total in pieces:
            matmul(part, weight.t(), out=total)
        return out

    def _fp8_part(self, quantised: Quantised) -> torch.Tensor:
        return self.of_codes(quantised, torch.float32, None)[None]

    def _plain(
        self, rows: torch.Tensor, addend: torch.Tensor | None, width: int | None = None
    ) -> torch.Tensor:
        added = self.bias if addend is None else addend
        if isinstance(self.weight, Packed):
            return weight_only_matmul(rows, self.weight, added)
        return matmul(rows, self.weight.t(), added, width=width)

    def of_codes(
        self, quantised: Quantised, dtype: torch.dtype, addend: torch.Tensor | None
    ) -> torch.Tensor:
        """Of FP8 weights: codes [M, K] and scales [M, K / 128] or [M] -> [M, N]."""
        assert self.scales is not None and not isinstance(self.weight, Packed)  # noqa: PT018
        added = self.bias if addend is None else addend
        return fp8_matmul(*quantised, self.weight, self.scales, added, dtype=dtype)


def add_over_ranks(parts: torch.Tensor, residual: torch.Tensor, spread: Spread) -> torch.Tensor:
    """residual [M, N] plus all ranks' parts, of which ``parts`` [P, M, N] are here; rounded once.

    The order is that of `Spread.sum`.
    """
    if spread.n_ranks > 1:
        own = parts[0] if len(parts) == 1 else add_parts(parts)
        if adds_whole(own, spread.group):
            parts = gather_parts(own, spread.group)
        else:
            parts = sum_over_ranks(own, spread.group)[None]
    return add_parts(parts, residual)


def _by_output(layer: Any) -> torch.Tensor:
    """The scales [N] of a layer that has one a tensor, or one an output."""
    scales = here(layer.weight_scale_inv.detach()).reshape(-1)
    return scales.repeat_interleave(len(here(layer.weight)) // len(scales))


def _one_scale(layer: Any) -> OneScale:
    """How such a layer's rows are quantised."""
    given = layer.activation_scale
    return OneScale(None if given is None else here(given.detach()).reshape(1), row_bound(layer))


def _join(layers: tuple[Any, ...], name: str, dim: int = 0) -> torch.Tensor:
    parts = [here(getattr(layer, name).detach()) for layer in layers]
    if len(parts) == 1:
        return parts[0]
    # Not every torch concatenates FP8.
    dtype = parts[0].dtype
    plain = [p.view(torch.uint8) if dtype.itemsize == 1 else p for p in parts]
    joined = torch.cat(plain, dim).view(dtype)
    for layer, part in zip(layers, joined.split([p.shape[dim] for p in parts], dim), strict=True):
        _put(layer, name, part)
    return joined


def _put(layer: Any, name: str, part: torch.Tensor) -> None:
    """Let a parameter's memory be ``part``: on ranks, its shard's."""
    own = getattr(layer, name)
    if not hasattr(own, "device_mesh"):
        own.data = part
        return
    from torch.distributed.tensor import DTensor

    shard = DTensor.from_local(
        part, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )
    setattr(layer, name, torch.nn.Parameter(shard, own.requires_grad))


def can_join(*layers: Any) -> bool:
    """Do they meet in one product: all plain, all of integers in groups of one kind, or all FP8,
    whose blocks do not span two of them, or whose rows are quantised alike?
    """
    if len(layers) == 1:
        return True
    kinds = {_kind(layer) for layer in layers}
    if kinds == {"fp8"}:
        widths = [(layer.out_features, len(here(layer.weight))) for layer in layers[:-1]]
        return all(width % 128 == 0 for each in widths for width in each)
    has_own_groups = any(getattr(layer, "group_of", None) is not None for layer in layers)
    return len(kinds) == 1 and not has_own_groups


def _kind(layer: Any) -> Hashable:
    """What layers must share; None of plain ones."""
    if isinstance(layer, WeightOnlyLinear):
        zeros = None if layer.zeros is None else layer.zeros.dtype
        return layer.bits, layer.packed.group_size, layer.scales.dtype, zeros
    if is_row_fp8(layer):
        given = layer.activation_scale
        is_known = given is not None and not given.is_meta
        return row_bound(layer), float(here(given)) if is_known else None
    return "fp8" if is_block_fp8(layer) else None
