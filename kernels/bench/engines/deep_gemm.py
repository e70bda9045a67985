"""DeepGEMM's products of an FP8 8B shape, compiled all at once and kept on disk.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.engines.deep_gemm ROWS,ROWS,...

vLLM's engines would compile them one after the other, five seconds each, as they meet them. Needs
nvcc, and the same DG_JIT_CACHE_DIR as the engines.
"""

from __future__ import annotations

import sys
from itertools import product

from bench.fp8.products import SHAPES
from bench.parts import compile_each


def compile_one(n: int, k: int, rows: int) -> None:
    import torch
    from vllm.utils.deep_gemm import fp8_gemm_nt

    codes = torch.zeros(rows, k, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.ones(k // 128, -(-rows // 4) * 4, device="cuda")[:, :rows].t()
    weight = torch.zeros(n, k, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    weight_scales = torch.ones(n // 128, k // 128, device="cuda")
    out = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
    fp8_gemm_nt((codes, scales), (weight, weight_scales), out)
    torch.cuda.synchronize()


def main() -> int:
    rows = map(int, sys.argv[1].split(","))
    calls = [(n, k, m) for m, (n, k) in product(rows, SHAPES.values())]
    compile_each(compile_one, *zip(*calls, strict=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
