"""FP8 weights with a scale for a whole tensor or each output, times rows of one scale each.

Computes: for a row x and an output n, with the blocks b of 128 columns of K,
    round((sum over b of p[b]) * (s * t[n]), + bias[n]),
    where p[b] is the sum over b of (x / s, bounded by 448, rounded to e4m3) * (the weight's e4m3
    code), t the weight's scales, and s the row's scale: max(a, 2**-126), a being the given scale of
    a calibration or, without one, min(max |x|, bound) / 448.
Reduction order: in a group of 1024 columns, blocks in ascending order from 0, each added in
    float32; groups likewise; then times s * t, which is rounded first; then the bias; one rounding
    at the end. The order inside a block is the device's.
Depends on: K, and the row and the weights of one output. Nothing of the batch enters a scale.
Dtypes: rows bfloat16, float16 or float32; weights float8_e4m3fn; scales float32.
Not claimed: anything where s * t leaves float32's range; equal bits on other devices.

Experts are such products in groups.
"""

from collections.abc import Callable

import torch

from ndcheck_kernels.ops.block_fp8 import LARGEST, SMALLEST_SCALE
from ndcheck_kernels.ops.library import declare
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import implements

UNBOUNDED = float("inf")

# [..., K] x [N, K]^T with scales [S], each of N / S outputs, + [N] -> [..., N], of the rows' dtype.
# row_scale: one number, from calibration; bound: as above.
linear_op = declare(
    "row_fp8_linear(Tensor x, Tensor weight, Tensor scales, Tensor? bias=None, "
    "Tensor? row_scale=None, float? bound=None) -> Tensor"
)
# Rows in groups, [P, K] x [E, N, K]^T with scales [E, S]: rows up to ends[e] and from the end
# before it go through item e, whose rows have row_scale[e] where that is given -> [P, N].
grouped_op = declare(
    "row_fp8_grouped(Tensor rows, Tensor weight, Tensor scales, Tensor ends, "
    "Tensor? row_scale=None) -> Tensor"
)

Optional = torch.Tensor | None
LinearProduct = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Optional, Optional, float], torch.Tensor
]
GroupedProduct = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Optional], torch.Tensor
]


def register_row_fp8(device: str, linear: LinearProduct, grouped: GroupedProduct) -> None:
    """Register the products for a device. ``linear`` takes rows [M, K], and returns [M, N].

    Their given scales of rows are one a row, [M].
    """

    @implements(linear_op, device=device)
    def whole(
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
        bound: float | None = None,
    ) -> torch.Tensor:
        check(x, weight, scales, row_scale)
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        given = None if row_scale is None else row_scale.reshape(1).expand(len(rows))
        out = linear(rows, weight, scales, bias, given, UNBOUNDED if bound is None else bound)
        return out.view(*x.shape[:-1], weight.shape[0])

    @implements(grouped_op, device=device)
    def whole_groups(
        rows: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        ends: torch.Tensor,
        row_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        check(rows, weight, scales, row_scale)
        if row_scale is not None:
            place = torch.arange(len(rows), dtype=ends.dtype, device=ends.device)
            group = torch.searchsorted(ends, place, right=True)
            row_scale = row_scale[group.clamp(max=len(weight) - 1)]
        return grouped(rows, weight, scales, ends, row_scale)


def check(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, row_scale: torch.Tensor | None
) -> None:
    """Raises UnsupportedCallError for other dtypes or sizes than this module's."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UnsupportedCallError(f"rows are {x.dtype}")
    kinds = {scales.dtype, torch.float32 if row_scale is None else row_scale.dtype}
    if weight.dtype != torch.float8_e4m3fn or kinds != {torch.float32}:
        raise UnsupportedCallError(f"weights are {weight.dtype} with scales of {scales.dtype}")
    *lead, n, k = weight.shape
    if x.shape[-1] != k or list(scales.shape[:-1]) != lead or n % max(scales.shape[-1], 1):
        raise UnsupportedCallError(
            f"rows of {x.shape[-1]} times weights {tuple(weight.shape)} with scales "
            f"{tuple(scales.shape)}: their number divides that of the outputs"
        )
    if row_scale is not None and row_scale.numel() != torch.Size(lead).numel():
        raise UnsupportedCallError(f"{row_scale.numel()} scales of rows, where a matrix has one")


def quantise_rows(
    rows: torch.Tensor, given: torch.Tensor | None = None, bound: float = UNBOUNDED
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [M, K], given [M] -> e4m3 codes [M, K] and float32 scales [M], by torch's ops."""
    wide = rows.float()
    scales = (wide.abs().amax(-1).clamp(max=bound) / LARGEST) if given is None else given
    scales = scales.clamp(min=SMALLEST_SCALE)
    codes = (wide / scales[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes, scales


def quantise_weight(weight: torch.Tensor, n_scales: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [..., N, K] -> e4m3 codes, and float32 scales [..., n_scales].

    The largest magnitude that has a scale becomes 448, as in published checkpoints.
    """
    parts = weight.float().unflatten(-2, (n_scales, -1))
    scales = (parts.abs().amax((-2, -1)) / LARGEST).clamp(min=SMALLEST_SCALE)
    codes = (parts / scales[..., None, None]).to(torch.float8_e4m3fn)
    return codes.view(weight.shape), scales


def dequantise(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes [..., N, K] times scales [..., S], in float32, rounded to ``dtype``."""
    parts = weight.float().unflatten(-2, (scales.shape[-1], -1))
    return (parts * scales[..., None, None]).view(weight.shape).to(dtype)
