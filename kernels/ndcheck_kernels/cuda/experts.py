"""Experts and partial products on CUDA: importing this registers them."""

import torch

from ndcheck_kernels.cuda import device, routing
from ndcheck_kernels.cuda.products import grouped_matmul, matmul
from ndcheck_kernels.ops.experts import combine_op, route_op
from ndcheck_kernels.ops.products import register_grouped_product, register_partial_products
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import implements


def _grouped_mm(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, out_dtype: torch.dtype | None
) -> torch.Tensor:
    if a.dtype not in device.FLOATS or b.dtype != a.dtype or out_dtype not in (None, a.dtype):
        raise UnsupportedCallError(f"no grouped product of {a.dtype} and {b.dtype}")
    return grouped_matmul.grouped_matmul(a, b, offs)


register_grouped_product("cuda", _grouped_mm)


def _partial_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return matmul.matmul(x, weight.t(), out=_wide(x, weight, weight.shape[0]))


def _partial_grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    out = _wide(rows, weight, weight.shape[2])
    return grouped_matmul.grouped_matmul(rows, weight, ends, out)


def _wide(x: torch.Tensor, weight: torch.Tensor, n: int) -> torch.Tensor:
    if x.dtype not in device.FLOATS or weight.dtype != x.dtype:
        raise UnsupportedCallError(f"no partial product of {x.dtype} and {weight.dtype}")
    return torch.empty((x.shape[0], n), dtype=torch.float32, device=x.device)


register_partial_products("cuda", _partial_linear, _partial_grouped)


@implements(route_op, device="cuda")
def route_experts(
    index: torch.Tensor, weights: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return routing.route(index, weights, experts)


@implements(combine_op, device="cuda")
def combine_experts(rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[P, H], [T, k], [T, k] -> [T, H]: each token's rows, weighted, in the order given."""
    if rows.dtype == torch.float64:
        raise UnsupportedCallError("no float64")
    return grouped_matmul.combine(rows, place, weights)
