"""Products of rows with the weights of their own group (expert), and their weighted sum by token.

Computes: y[i] = x[i] @ b[g] for the group g of row i, fp32 accumulation, one rounding at the end;
    of a product that gives gates and up, `silu_mul` of both as they are rounded;
    out[t] = sum over j of weights[t, j] * rows[place[t, j]], plus a residual if given, in fp32, one
    rounding at the end.
Reduction order: the product's is that of `matmul` at the same (N, K): groups change which weights a
    row meets, not how it meets them. The sum's is that of j, one fused multiply-add each, the
    residual last.
Depends on: N, K, dtype, architecture. Not on how many rows a group has, which they are, or the
    other groups: these only choose tiles and schedule, held to one bit class as in `matmul`. No
    group has a capacity, nothing is added by atomics.
Dtypes: bfloat16, float16, float32 (IEEE, no TF32); x, b and y share one, weights may have another.
Not claimed: rows beyond the last group, which are not written; gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ndcheck_kernels.cuda import device
from ndcheck_kernels.cuda.configs import (
    MatmulConfig,
    chunk_length,
    gate_config,
    grouped_config,
    grouped_pointer_config,
    k_groups,
)
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.cuda.products.matmul_kernels import _prefetch
from ndcheck_kernels.cuda.products.tiles import accumulate, offsets, zeros
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul, silu_times

_COMBINE_BLOCK = 1024


@triton.jit
def _find_rows(ends_ptr, tile, E, E_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):
    """The group, first row and end of the group's rows of the tile-th tile of all groups.

    Group E or beyond if there are not so many tiles.
    """
    e = tl.arange(0, E_BLOCK)
    ends = tl.load(ends_ptr + e, e < E, other=0)
    starts = tl.load(ends_ptr + e - 1, (e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, tl.cdiv(ends - starts, BLOCK_M), 0)
    group = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(e < group, tiles, 0), 0)
    start = tl.sum(tl.where(e == group, starts, 0), 0)
    end = tl.sum(tl.where(e == group, ends, 0), 0)
    return group, start + (tile - before) * BLOCK_M, end


@triton.jit
def _grouped_pointer_kernel(
    x_ptr, b_ptr, y_ptr, ends_ptr, E, N, K, chunk,
    stride_xm, stride_xk, stride_be, stride_bk, stride_bn, stride_ym,
    GROUPS: tl.constexpr, E_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Any strides, any alignment, any architecture."""
    follow(PDL)
    num_n = tl.cdiv(N, BLOCK_N)
    group, first_m, end = _find_rows(ends_ptr, tl.program_id(0) // num_n, E, E_BLOCK, BLOCK_M)
    if group < E:
        offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        offs_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < end, offs_n < N
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm  # [BLOCK_M, 1]
        b_ptrs = b_ptr + group.to(tl.int64) * stride_be + offs_n[None, :] * stride_bn
        tot = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k_group in tl.static_range(GROUPS):
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in range(k_group * chunk, tl.minimum(K, (k_group + 1) * chunk), BLOCK_K):
                offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
                mask_k = offs_k < K
                x = tl.load(
                    x_ptrs + offs_k[None, :] * stride_xk, mask_m[:, None] & mask_k, other=0.0
                )  # [BLOCK_M, BLOCK_K]
                b = tl.load(
                    b_ptrs + offs_k[:, None] * stride_bk, mask_k[:, None] & mask_n, other=0.0
                )  # [BLOCK_K, BLOCK_N]
                acc = tl.dot(x, b, acc, input_precision="ieee")
            tot = tot + acc
        y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
        tl.store(y_ptrs, tot.to(y_ptr.dtype.element_ty), mask_m[:, None] & mask_n[None, :])


@triton.jit
def _grouped_tile_kernel(
    x_desc, x_ptr, source_ptr, stride_xm, w_desc, w_ptr, y_ptr, ends_ptr, E, N, K, chunk, stride_ym,
    GROUPS: tl.constexpr, E_BLOCK: tl.constexpr, SWAP: tl.constexpr, BY_COLUMN: tl.constexpr,
    BY_GROUP: tl.constexpr, GATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Operands through TMA; a tile may read rows and weights of the next group, which it drops.

    BY_GROUP: a program walks over all rows of its group, else it has one tile of them. GATE: rows
    are those of x that source names, and the weights N rows of gates above N rows of up.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    group, first_n = tl.program_id(0) // num_n, (tl.program_id(0) % num_n) * BLOCK_N
    height = 2 * N if GATE else N
    if PDL:
        gdc_launch_dependents()
        if PREFETCH and BY_GROUP:  # Else the group follows from what has not been waited for.
            ahead = group * height + first_n
            _prefetch(w_ptr, ahead, 0, E * height, K, K, BLOCK_N, PREFETCH)
            if GATE:
                _prefetch(w_ptr, ahead + N, 0, E * height, K, K, BLOCK_N, PREFETCH)
        gdc_wait()
    if BY_GROUP:
        first = tl.load(ends_ptr + group - 1, group > 0, other=0)
        end = tl.load(ends_ptr + group)
        last = end
    else:
        group, first, end = _find_rows(ends_ptr, group, E, E_BLOCK, BLOCK_M)
        last = tl.minimum(first + BLOCK_M, end)
    for first_m in range(first, last, BLOCK_M):
        offs_m, offs_n = offsets(first_m, first_n, BLOCK_M, BLOCK_N, SWAP)
        tot = zeros(BLOCK_M, BLOCK_N, SWAP)
        up_tot = zeros(BLOCK_M, BLOCK_N, SWAP)
        if GATE:
            row = first_m + tl.arange(0, BLOCK_M)
            source = tl.load(source_ptr + row, row < end, other=0)
            x_ptrs = x_ptr + source[:, None] * stride_xm  # [BLOCK_M, 1]
        for k_group in tl.static_range(GROUPS):
            acc = zeros(BLOCK_M, BLOCK_N, SWAP)
            up = zeros(BLOCK_M, BLOCK_N, SWAP)
            for k in range(k_group * chunk, tl.minimum(K, (k_group + 1) * chunk), BLOCK_K):
                if GATE:
                    offs_k = k + tl.arange(0, BLOCK_K)
                    mask = (row < end)[:, None] & (offs_k < K)[None, :]
                    x = tl.load(x_ptrs + offs_k[None, :], mask, other=0.0)  # [BLOCK_M, BLOCK_K]
                else:
                    x = x_desc.load([first_m, k])
                if BY_COLUMN:
                    w = w_desc.load([group * K + k, first_n]).T
                else:
                    w = w_desc.load([group * height + first_n, k])  # [BLOCK_N, BLOCK_K]
                acc = accumulate(x, w, acc, SWAP)
                if GATE:
                    w = w_desc.load([group * height + N + first_n, k])
                    up = accumulate(x, w, up, SWAP)
            tot = acc if GROUPS == 1 else tot + acc
            up_tot = up if GROUPS == 1 else up_tot + up
        y = tot.to(y_ptr.dtype.element_ty)
        if GATE:
            y = silu_times(y, up_tot.to(y.dtype)).to(y.dtype)
        tl.store(y_ptr + offs_m * stride_ym + offs_n, y, (offs_m < end) & (offs_n < N))


@triton.jit
def _combine_kernel(
    rows_ptr, place_ptr, weights_ptr, residual_ptr, out_ptr, N, stride_rm,
    HAS_RESIDUAL: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_n < N
    tot = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(place_ptr + token * TOP_K + j).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOP_K + j).to(tl.float32)
        part = tl.load(rows_ptr + row * stride_rm + offs_n, mask, other=0.0).to(tl.float32)
        tot = tl.fma(part, weight, tot)
    if HAS_RESIDUAL:
        tot += tl.load(residual_ptr + token * N + offs_n, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * N + offs_n, tot.to(out_ptr.dtype.element_ty), mask)


def grouped_matmul(
    x: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [P, K] in order of groups, b [E, K, N], ends [E] int32 -> [P, N].

    Group g has the rows from the end of the group before it up to ends[g]. ``out`` has the dtype of
    x or fp32.
    """
    if x.dtype not in device.FLOATS or b.dtype != x.dtype:
        raise TypeError(
            f"grouped_matmul takes one of {device.FLOATS} throughout, not {x.dtype}, {b.dtype}"
        )
    if x.dim() != 2 or b.dim() != 3 or x.shape[1] != b.shape[1] or ends.shape != b.shape[:1]:
        shapes = tuple(x.shape), tuple(b.shape), tuple(ends.shape)
        raise ValueError(
            f"grouped_matmul cannot multiply {shapes[0]} by {shapes[1]} in {shapes[2]}"
        )
    capability = device.capability(x.device)
    groups = k_groups(b.shape[2], b.shape[1], x.element_size(), capability)
    config = grouped_config(len(x), len(b), x.element_size(), capability)
    return _launch(x, b, ends, out, config, groups)


def grouped_gate(
    x: torch.Tensor, source: torch.Tensor, b: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """`silu_mul` of the halves of the product of x[source]: x [T, K], b [E, K, 2 N] -> [P, N].

    ``source`` [P] int64 names rows of x in order of groups. One launch where groups have few rows.
    """
    config = gate_config(len(source), len(b), x.element_size(), device.capability(x.device))
    fits = _rows_fit(x) and b.mT.is_contiguous() and _is_aligned(b, b.shape[1])
    if config is None or x.dtype != b.dtype or not fits:
        gate, up = grouped_matmul(x[source], b, ends).chunk(2, -1)
        return silu_mul(gate, up)
    groups = k_groups(b.shape[2], b.shape[1], x.element_size(), device.capability(x.device))
    return _launch(x, b, ends, None, config, groups, source)


def _launch(
    x: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, out: torch.Tensor | None,
    config: MatmulConfig, groups: int, source: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Of rows of x as they are, or with a gate of those that ``source`` names."""
    m, (e, k, height) = len(x) if source is None else len(source), b.shape
    n = height if source is None else height // 2
    y = torch.empty((m, n), dtype=x.dtype, device=x.device) if out is None else out
    if y.numel() == 0:
        return y
    ends = ends.to(torch.int32).contiguous()
    by_row = b.mT.is_contiguous() and _is_aligned(b, k)
    by_column = b.is_contiguous() and _is_aligned(b, n) and k % config.block_k == 0
    if config.kind == "tile" and not (_rows_fit(x) and (by_row or by_column)):
        config = grouped_pointer_config(m, e, x.element_size(), device.capability(x.device))
    # A group adds at most one tile that is not full.
    by_group = config.swap and m > e
    tiles = (e if by_group else min(e, m) + m // config.block_m) * triton.cdiv(n, config.block_n)
    shared = {
        "GROUPS": groups, "E_BLOCK": triton.next_power_of_2(e), "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "num_warps": config.warps,
        "num_stages": config.stages, "enable_fp_fusion": True, **pdl(y.device),
    }  # fmt: skip
    chunk = chunk_length(k, groups)
    if config.kind == "pointer":
        _grouped_pointer_kernel[(tiles,)](
            x, b, y, ends, e, n, k, chunk, *x.stride(), *b.stride(), y.stride(0), **shared
        )
        return y
    if by_row:
        w_desc = TensorDescriptor.from_tensor(
            b.mT.reshape(e * height, k), [config.block_n, config.block_k]
        )
    else:
        w_desc = TensorDescriptor.from_tensor(b.view(e * k, n), [config.block_k, config.block_n])
    _grouped_tile_kernel[(tiles,)](
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]), x,
        ends if source is None else source, x.stride(0), w_desc, b, y, ends, e, n, k, chunk,
        y.stride(0), SWAP=config.swap, BY_COLUMN=not by_row, BY_GROUP=by_group,
        GATE=source is not None, PREFETCH=config.prefetch if by_row else 0, **shared,
    )  # fmt: skip
    return y


def _rows_fit(x: torch.Tensor) -> bool:
    return x.stride(1) == 1 and _is_aligned(x, x.stride(0))


def _is_aligned(t: torch.Tensor, row: int) -> bool:
    """Whether TMA can read rows of this many elements."""
    return row * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def combine(
    rows: torch.Tensor,
    place: torch.Tensor,
    weights: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """rows [P, N], place and weights [T, k], residual [T, N] -> [T, N]."""
    device.require_float("combine", rows, weights)
    tokens, n = len(place), rows.shape[1]
    out = torch.empty((tokens, n), dtype=rows.dtype, device=rows.device)
    if residual is not None and (residual.shape != out.shape or residual.dtype != out.dtype):
        raise ValueError(
            f"combine cannot add {residual.dtype} {tuple(residual.shape)} to {tokens} x {n}"
        )
    if out.numel() == 0:
        return out
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    _combine_kernel[(tokens, triton.cdiv(n, _COMBINE_BLOCK))](
        rows, place.contiguous(), weights.contiguous(),
        None if residual is None else residual.contiguous(), out, n, rows.stride(0),
        HAS_RESIDUAL=residual is not None, TOP_K=place.shape[1], BLOCK=_COMBINE_BLOCK, num_warps=4,
        enable_fp_fusion=False, **pdl(out.device),
    )  # fmt: skip
    return out
