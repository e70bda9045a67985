"""FP8 weights in blocks of 128 x 128, times rows that are quantised as they come.

Computes: for a row x and an output n, with the blocks b of 128 columns of K,
    round(sum over b of p[b] * (s[b] * t[n // 128, b]), + bias[n]),
    where s[b] = max(max |x| over b / 448, 2**-126) is the row's scale, p[b] the sum over b of
    (x / s[b], rounded to e4m3) * (the weight's e4m3 code), and t the weight's scales.
Reduction order: K is cut into groups of 1024 columns. In a group, blocks in ascending order, from
    0: a block enters the float32 sum by one fused multiply-add, whose factor s * t is rounded
    first. Groups are added in ascending order, from 0; then the bias; one rounding at the end. The
    order inside a block is the device's.
Depends on: K, and the row and the weights of one output. Nothing of the batch enters a scale.
Dtypes: rows bfloat16, float16 or float32; weights float8_e4m3fn; weights' scales float32.
Not claimed: anything where s * t leaves float32's range; equal bits on other devices.

An incomplete last block of K or N has a scale of its own. Experts are such products in groups.
"""

from collections.abc import Callable

import torch

from ndcheck_kernels.ops.library import declare
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import implements

BLOCK = 128
GROUP = 1024
"""Columns of K that are summed apart, so that few rows can be multiplied by the whole chip."""
LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny

# [..., K] x [N, K]^T with scales [N / 128, K / 128], + [N] -> [..., N], of the rows' dtype.
linear_op = declare(
    "block_fp8_linear(Tensor x, Tensor weight, Tensor scales, Tensor? bias=None) -> Tensor"
)
# Rows in groups, [P, K] x [E, N, K]^T with scales [E, N / 128, K / 128]: rows up to ends[e] and
# from the end before it go through item e -> [P, N].
grouped_op = declare(
    "block_fp8_grouped(Tensor rows, Tensor weight, Tensor scales, Tensor ends) -> Tensor"
)
# Parts of longer sums: as above, in float32.
partial_linear_op = declare(
    "partial_block_fp8_linear(Tensor x, Tensor weight, Tensor scales) -> Tensor"
)
partial_grouped_op = declare(
    "partial_block_fp8_grouped(Tensor rows, Tensor weight, Tensor scales, Tensor ends) -> Tensor"
)

LinearProduct = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.dtype], torch.Tensor
]
GroupedProduct = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor
]


def register_block_fp8(device: str, linear: LinearProduct, grouped: GroupedProduct) -> None:
    """Register the products for a device, both with the result's dtype as their last argument.

    ``linear`` takes rows [M, K], and returns [M, N].
    """

    def flat(
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        check(x, weight, scales)
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return linear(rows, weight, scales, bias, dtype).view(*x.shape[:-1], weight.shape[0])

    @implements(linear_op, device=device)
    def whole(
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return flat(x, weight, scales, bias, x.dtype)

    @implements(partial_linear_op, device=device)
    def part(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return flat(x, weight, scales, None, torch.float32)

    @implements(grouped_op, device=device)
    def whole_groups(
        rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        check(rows, weight, scales)
        return grouped(rows, weight, scales, ends, rows.dtype)

    @implements(partial_grouped_op, device=device)
    def part_of_groups(
        rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        check(rows, weight, scales)
        return grouped(rows, weight, scales, ends, torch.float32)


def check(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> None:
    """Raises UnsupportedCallError for other dtypes, sizes or blocks than this module's."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UnsupportedCallError(f"rows are {x.dtype}")
    if weight.dtype != torch.float8_e4m3fn or scales.dtype != torch.float32:
        raise UnsupportedCallError(f"weights are {weight.dtype} with scales of {scales.dtype}")
    blocks = (*weight.shape[:-2], *(-(-size // BLOCK) for size in weight.shape[-2:]))
    if x.shape[-1] != weight.shape[-1] or tuple(scales.shape) != blocks:
        raise UnsupportedCallError(
            f"rows of {x.shape[-1]} times weights {tuple(weight.shape)} with scales "
            f"{tuple(scales.shape)}: blocks of {BLOCK} x {BLOCK} have {blocks}"
        )


def quantise_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [M, K] -> e4m3 codes [M, K] and float32 scales [M, K / 128], by torch's ops."""
    m, k = rows.shape
    padded = torch.nn.functional.pad(rows.float(), (0, -k % BLOCK)).view(m, -1, BLOCK)
    scales = (padded.abs().amax(-1) / LARGEST).clamp(min=SMALLEST_SCALE)
    codes = (padded / scales[..., None]).to(torch.float8_e4m3fn)
    return codes.view(m, -1)[:, :k].contiguous(), scales


def quantise_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [..., N, K] -> e4m3 codes, and float32 scales [..., N / 128, K / 128].

    A block's largest magnitude becomes 448, as in published checkpoints.
    """
    *lead, n, k = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.view(*lead, -(-n // BLOCK), BLOCK, -(-k // BLOCK), BLOCK)
    scales = (blocks.abs().amax((-3, -1)) / LARGEST).clamp(min=SMALLEST_SCALE)
    codes = (blocks / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[..., :n, :k].contiguous(), scales


def dequantise(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes [..., N, K] times scales [..., N / 128, K / 128], in float32, rounded to ``dtype``."""
    n, k = weight.shape[-2:]
    wide = scales.repeat_interleave(BLOCK, -2)[..., :n, :].repeat_interleave(BLOCK, -1)[..., :k]
    return (weight.float() * wide).to(dtype)
