"""Matrix product with a K-grouping that never follows the batch.

Computes: y = alpha * a @ b + beta * c, fp32 accumulation, one rounding at the end.
Reduction order: K is cut into S chunks of `chunk_length(K, S)`; a chunk is accumulated by the
    tensor cores in ascending k from zero (fp32 input: one fused multiply-add per k), chunks are
    added in ascending order. S = configs.k_groups(N, K, dtype, capability).
    A schedule may be borrowed: cuBLASLt's, where it was proven to have these bits (`borrowed`);
    or come from a table that was tuned on this machine, of configurations proven here (`proofs`).
Depends on: N, K, dtype, architecture. Not on M, the batch size, the row's position, its
    neighbours, strides or alignment: these only choose tiles and schedule, and the GPU tests hold
    every selectable configuration to one bit class.
Dtypes: bfloat16, float16, float32 (IEEE, no TF32); a, b, c and out share one, or out is fp32.
Not claimed: equality across architectures or Triton versions, float64, gradients.
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
    borrows,
    chunk_length,
    k_groups,
    matmul_config,
    pointer_config,
)
from ndcheck_kernels.cuda.dependent_launch import follow, pdl
from ndcheck_kernels.cuda.products import borrowed, proofs
from ndcheck_kernels.cuda.products.tiles import accumulate, offsets, zeros


@triton.jit
def _finish(acc, c, alpha, beta, HAS_C: tl.constexpr):
    acc = acc * alpha
    if HAS_C:
        acc += c.to(tl.float32) * beta
    return acc


@triton.jit
def _matmul_pointer_kernel(
    a_ptr, b_ptr, c_ptr, y_ptr, alpha, beta,
    M, N, K, chunk,
    stride_ab, stride_am, stride_ak,
    stride_bb, stride_bk, stride_bn,
    stride_cb, stride_cm, stride_cn,
    stride_yb, stride_ym, stride_yn,
    GROUPS: tl.constexpr, HAS_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Any strides, any alignment, any architecture."""
    num_m = tl.cdiv(M, BLOCK_M)
    batch = tl.program_id(1).to(tl.int64)
    offs_m = (tl.program_id(0) % num_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) // num_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    a_ptrs = a_ptr + batch * stride_ab + offs_m[:, None] * stride_am  # [BLOCK_M, 1]
    b_ptrs = b_ptr + batch * stride_bb + offs_n[None, :] * stride_bn  # [1, BLOCK_N]
    tot = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in tl.static_range(GROUPS):
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(group * chunk, tl.minimum(K, (group + 1) * chunk), BLOCK_K):
            offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
            mask_k = offs_k < K
            a = tl.load(
                a_ptrs + offs_k[None, :] * stride_ak, mask_m[:, None] & mask_k[None, :], other=0.0
            )  # [BLOCK_M, BLOCK_K]
            b = tl.load(
                b_ptrs + offs_k[:, None] * stride_bk, mask_k[:, None] & mask_n[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(a, b, acc, input_precision="ieee")
        tot = tot + acc
    mask = mask_m[:, None] & mask_n[None, :]
    c = tot
    if HAS_C:
        c_ptrs = c_ptr + batch * stride_cb + offs_m[:, None] * stride_cm
        c = tl.load(c_ptrs + offs_n[None, :] * stride_cn, mask, other=0.0)
    y = _finish(tot, c, alpha, beta, HAS_C)
    y_ptrs = y_ptr + batch * stride_yb + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _store(
    acc, c_ptr, y_ptr, alpha, beta, M, N, stride_cm,
    stride_cn, stride_ym, first_m, first_n, HAS_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    offs_m, offs_n = offsets(first_m, first_n, BLOCK_M, BLOCK_N, SWAP)
    mask = (offs_m < M) & (offs_n < N)
    c = acc
    if HAS_C:
        c = tl.load(c_ptr + offs_m * stride_cm + offs_n * stride_cn, mask, other=0.0)
    y = _finish(acc, c, alpha, beta, HAS_C)
    tl.store(y_ptr + offs_m * stride_ym + offs_n, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _sum_groups(
    acc, partial_ptr, group, counter_ptr, M, N, first_m,
    first_n, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """Leave this group's part; whoever comes last adds them all, in ascending order."""
    offs_m, offs_n = offsets(first_m, first_n, BLOCK_M, BLOCK_N, SWAP)
    mask = (offs_m < M) & (offs_n < N)
    ptrs = partial_ptr + offs_m * N + offs_n
    size = M.to(tl.int64) * N
    tl.store(ptrs + group * size, acc, mask)
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == GROUPS - 1
    if last:
        acc = zeros(BLOCK_M, BLOCK_N, SWAP)
        for g in tl.static_range(GROUPS):
            acc = acc + tl.load(ptrs + g * size, mask, other=0.0, cache_modifier=".cg")
        tl.store(counter_ptr, 0)
    return acc, last


@triton.jit
def _prefetch(w_ptr, first_n, first_k, N, K, stride_wn, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Ask L2 for the first weights of a tile: a hint, so it need not wait for earlier kernels."""
    offs_n = tl.minimum(first_n.to(tl.int64) + tl.arange(0, ROWS), N - 1)[:, None]
    offs_k = tl.minimum(first_k + tl.arange(0, COLUMNS // 64) * 64, K - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
        [(w_ptr + offs_n * stride_wn + offs_k).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _matmul_tile_kernel(
    x_desc, w_desc, extra_desc, w_ptr, stride_wn, c_ptr, y_ptr, partial_ptr,
    counter_ptr, alpha, beta, M, N, K, chunk, stride_cm,
    stride_cn, stride_ym, GROUPS: tl.constexpr, PARALLEL: tl.constexpr, SWAP: tl.constexpr,
    HAS_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One output tile per program (and K-group, if PARALLEL); operands through TMA."""
    num_m = tl.cdiv(M, BLOCK_M)
    num_tiles = num_m * tl.cdiv(N, BLOCK_N + EXTRA_N)
    tile = tl.program_id(0) % num_tiles
    first_m = (tile % num_m) * BLOCK_M
    first_n = (tile // num_m) * (BLOCK_N + EXTRA_N)
    group = tl.program_id(0) // num_tiles if PARALLEL else 0
    if PDL:
        gdc_launch_dependents()
        if PREFETCH:
            _prefetch(w_ptr, first_n, group * chunk, N, K, stride_wn, BLOCK_N, PREFETCH)
        gdc_wait()
    tot = zeros(BLOCK_M, BLOCK_N, SWAP)
    extra_tot = zeros(BLOCK_M, EXTRA_N if EXTRA_N else 16, SWAP)
    for g in tl.static_range(1 if PARALLEL else GROUPS):
        acc = zeros(BLOCK_M, BLOCK_N, SWAP)
        extra = zeros(BLOCK_M, EXTRA_N if EXTRA_N else 16, SWAP)
        for k in range((group + g) * chunk, tl.minimum(K, (group + g + 1) * chunk), BLOCK_K):
            x = x_desc.load([first_m, k])  # [BLOCK_M, BLOCK_K]
            w = w_desc.load([first_n, k])  # [BLOCK_N, BLOCK_K]
            acc = accumulate(x, w, acc, SWAP)
            if EXTRA_N:
                w = extra_desc.load([first_n + BLOCK_N, k])  # [EXTRA_N, BLOCK_K]
                extra = accumulate(x, w, extra, SWAP)
        if PARALLEL or GROUPS == 1:
            tot = acc
            extra_tot = extra
        else:
            tot = tot + acc
            extra_tot = extra_tot + extra
    last = True
    if PARALLEL:
        tot, last = _sum_groups(
            tot, partial_ptr, group, counter_ptr + tile, M, N, first_m, first_n, GROUPS,
            BLOCK_M, BLOCK_N, SWAP,
        )  # fmt: skip
    if last:
        _store(
            tot, c_ptr, y_ptr, alpha, beta, M, N, stride_cm, stride_cn, stride_ym, first_m,
            first_n, HAS_C, BLOCK_M, BLOCK_N, SWAP,
        )  # fmt: skip
        if EXTRA_N:
            _store(
                extra_tot, c_ptr, y_ptr, alpha, beta, M, N, stride_cm, stride_cn, stride_ym,
                first_m, first_n + BLOCK_N, HAS_C, BLOCK_M, EXTRA_N, SWAP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _matmul_persistent_kernel(
    x_desc, w_desc, y_desc, c_ptr, alpha, beta, M, N,
    K, stride_cm, stride_cn, PROGRAMS: tl.constexpr, HAS_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr, BAND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program walks over output tiles, in bands of rows that share weights in L2."""
    follow(PDL)
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), num_m * num_n, PROGRAMS, warp_specialize=WARP_SPECIALIZE
    ):
        band = tile // (BAND * num_n)
        band_m = tl.minimum(num_m - band * BAND, BAND)
        first_m = (band * BAND + (tile % (BAND * num_n)) % band_m) * BLOCK_M
        first_n = ((tile % (BAND * num_n)) // band_m) * BLOCK_N
        acc = zeros(BLOCK_M, BLOCK_N, SWAP)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([first_m, k])  # [BLOCK_M, BLOCK_K]
            w = w_desc.load([first_n, k])  # [BLOCK_N, BLOCK_K]
            acc = accumulate(x, w, acc, SWAP)
        c = acc
        if HAS_C:
            offs_m, offs_n = offsets(first_m, first_n, BLOCK_M, BLOCK_N, SWAP)
            c_ptrs = c_ptr + offs_m * stride_cm + offs_n * stride_cn
            c = tl.load(c_ptrs, (offs_m < M) & (offs_n < N), other=0.0)
        y = _finish(acc, c, alpha, beta, HAS_C).to(y_desc.dtype)
        y_desc.store([first_m, first_n], y.T if SWAP else y)


def matmul(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, *,
    alpha: float = 1.0, beta: float = 1.0, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """alpha * a @ b + beta * c for [M, K] @ [K, N] or [B, M, K] @ [B, K, N].

    ``out`` may be fp32 whatever the operands: the sum as it is, for one that goes on elsewhere.
    """
    shared = (b, c, None if out is None or out.dtype == torch.float32 else out)
    if a.dtype not in device.FLOATS or any(t.dtype != a.dtype for t in shared if t is not None):
        raise TypeError(
            f"matmul takes one of {device.FLOATS} throughout, not {a.dtype} @ {b.dtype}"
        )
    if a.dim() != b.dim() or a.dim() not in (2, 3) or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul cannot multiply {tuple(a.shape)} by {tuple(b.shape)}")
    (m, k), n = a.shape[-2:], b.shape[-1]
    size, capability = a.element_size(), device.capability(a.device)
    groups = k_groups(n, k, size, capability)
    config, is_faster_borrowed = proofs.choose(
        a.device, a.dtype, m, (n, k, groups), matmul_config(m, n, k, size, capability),
        borrows(m, n, k, size, capability),
    )  # fmt: skip
    c = c if beta else None
    if is_faster_borrowed and alpha == 1 and (c is None or beta == 1):
        y = _borrow(a, b, c, out, config, groups)
        if y is not None:
            return y
    return _launch(a, b, c, alpha, beta, out, config, groups)


def _borrow(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, out: torch.Tensor | None,
    config: MatmulConfig, groups: int,
) -> torch.Tensor | None:  # fmt: skip
    """The product by cuBLASLt, if it can take it and was seen to have the bits of `config`."""

    def ours(x: torch.Tensor, w: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        return _launch(x, w.t(), addend, 1.0, 1.0, None, config, groups)

    shape = (*a.shape[:-1], b.shape[-1])
    is_added = c is not None and (c.shape != shape or groups > 1)
    if a.dim() != 2 or 0 in shape or is_added:
        return None
    y = a.new_empty(shape) if out is None else out
    w = b.t()
    if y.shape != shape or not borrowed.fits(a, w, y, c):
        return None
    return (
        borrowed.product(a, w, y, c, groups) if borrowed.is_proven(a, w, c, groups, ours) else None
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias for x [..., K], weight [N, K]; every leading dimension counts as M."""
    y = matmul(x.reshape(-1, x.shape[-1]), weight.t(), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _launch(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, alpha: float, beta: float,
    out: torch.Tensor | None, config: MatmulConfig, groups: int,
) -> torch.Tensor:  # fmt: skip
    if reason := config.refusal(groups):
        raise ValueError(reason)
    shape = (*a.shape[:-1], b.shape[-1])
    y = torch.empty(shape, dtype=a.dtype, device=a.device) if out is None else out
    if y.shape != shape:
        raise ValueError(f"out has shape {tuple(y.shape)}, not {shape}")
    if y.numel() == 0:
        return y
    c = None if c is None else c.expand(shape)
    # A persistent kernel stores through shared memory: no room for fp32 beside its operands.
    is_wide = config.kind == "persistent" and y.element_size() > a.element_size()
    if config.kind != "pointer" and (is_wide or not all(_fits_tma(t) for t in (a, b.mT, y))):
        config = pointer_config(a.shape[-2], a.element_size(), device.capability(a.device))
        config = proofs.unless_shut_out(a.device, a.dtype, (shape[-1], a.shape[-1], groups), config)
    launch = {"pointer": _launch_pointer, "tile": _launch_tile, "persistent": _launch_persistent}
    launch[config.kind](a, b, c, y, alpha, beta, config, groups)
    return y


def _fits_tma(t: torch.Tensor) -> bool:
    """Rows contiguous, and both they and the base aligned to 16 bytes."""
    return (
        t.dim() == 2
        and t.numel() > 0
        and t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
    )


def _launch_pointer(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, y: torch.Tensor,
    alpha: float, beta: float, config: MatmulConfig, groups: int,
) -> None:  # fmt: skip
    (m, k), n = a.shape[-2:], b.shape[-1]
    operands = [t if t.dim() == 3 else t[None] for t in (a, b, y if c is None else c, y)]
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    _matmul_pointer_kernel[(tiles, operands[0].shape[0])](
        *operands, alpha, beta, m, n, k, chunk_length(k, groups),
        *(s for t in operands for s in t.stride()),
        GROUPS=groups, HAS_C=c is not None,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _launch_tile(
    x: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, y: torch.Tensor,
    alpha: float, beta: float, config: MatmulConfig, groups: int,
) -> None:  # fmt: skip
    (m, k), n, w = x.shape, b.shape[1], b.t()
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n + config.extra_n)
    partial, counter = y, y  # stand in where nothing is left in parts
    if config.parallel:
        partial = torch.empty((groups, m, n), dtype=torch.float32, device=y.device)
        counter = device.counters(tiles, y.device)
    w_desc = TensorDescriptor.from_tensor(w, [config.block_n, config.block_k])
    extra_desc = w_desc
    if config.extra_n:
        extra_desc = TensorDescriptor.from_tensor(w, [config.extra_n, config.block_k])
    _matmul_tile_kernel[(tiles * (groups if config.parallel else 1),)](
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]), w_desc, extra_desc,
        w, w.stride(0), y if c is None else c, y, partial, counter, alpha, beta, m, n, k,
        chunk_length(k, groups), *(y if c is None else c).stride(), y.stride(0),
        GROUPS=groups, PARALLEL=config.parallel, SWAP=config.swap, HAS_C=c is not None,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, EXTRA_N=config.extra_n,
        BLOCK_K=config.block_k, PREFETCH=config.prefetch, num_warps=config.warps,
        num_stages=config.stages, enable_fp_fusion=True, **pdl(y.device),
    )  # fmt: skip


def _launch_persistent(
    x: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, y: torch.Tensor,
    alpha: float, beta: float, config: MatmulConfig, groups: int,
) -> None:  # fmt: skip
    (m, k), n, w = x.shape, b.shape[1], b.t()
    programs = device.sm_count(y.device)
    _matmul_persistent_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(w, [config.block_n, config.block_k]),
        TensorDescriptor.from_tensor(y, [config.block_m, config.block_n]),
        y if c is None else c, alpha, beta, m, n, k, *(y if c is None else c).stride(),
        PROGRAMS=programs, HAS_C=c is not None, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, SWAP=config.swap, WARP_SPECIALIZE=config.specialize, BAND=8,
        num_warps=config.warps,
        num_stages=config.stages, enable_fp_fusion=True, **pdl(y.device),
    )  # fmt: skip
