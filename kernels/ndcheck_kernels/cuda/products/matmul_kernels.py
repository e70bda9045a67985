"""The Triton kernels of `matmul`: any operands, one tile a program, or tiles in turn."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ndcheck_kernels.cuda.dependent_launch import follow
from ndcheck_kernels.cuda.products.tiles import accumulate, offsets, sum_groups, zeros


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
        offs_m, offs_n = offsets(first_m, first_n, BLOCK_M, BLOCK_N, SWAP)
        tot, last = sum_groups(
            tot, partial_ptr + offs_m * N + offs_n, M.to(tl.int64) * N,
            (offs_m < M) & (offs_n < N), group, counter_ptr + tile, GROUPS,
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
