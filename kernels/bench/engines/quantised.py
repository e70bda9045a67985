"""Products of FP8 and 4-bit weights beside those that vLLM serves with, on one GPU.

    PYTHONPATH=$PWD:$PWD/kernels python -m bench.engines.quantised OUT_DIR

With vLLM installed. FP8 in blocks of 128 x 128, of rows that are quantised already: vLLM's CUTLASS
product and DeepGEMM, which compiles itself with nvcc and is named as refused where it cannot. 4-bit
weights in groups of 128, whose zero is 8: Marlin. Writes fp8.csv and int4.csv row by row; a ratio
is vLLM's time over ours. Each of vLLM's products must come near ours, or near its own weight in
bf16, before it is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.fp8.products import BATCHES, SHAPES, compile_shipped, runs, weights
from bench.table import Table, print_means
from bench.weight_only.products import GROUP, draw
from ndcheck_kernels.cuda.products.fp8.fp8_matmul import fp8_matmul
from ndcheck_kernels.cuda.products.weight_only import weight_only_matmul
from ndcheck_kernels.cuda.rows.quantise import quantise_rows
from ndcheck_kernels.measure.timing import copies, medians_us

Held = tuple[torch.Tensor, torch.Tensor]


def cutlass(codes: torch.Tensor, scales: torch.Tensor, weight: Held) -> torch.Tensor:
    from vllm import _custom_ops as ops

    return ops.cutlass_scaled_mm(codes, weight[0].t(), scales, weight[1].t(), torch.bfloat16)


def deep_gemm(codes: torch.Tensor, scales: torch.Tensor, weight: Held) -> torch.Tensor:
    from vllm.third_party import deep_gemm

    out = codes.new_empty(len(codes), len(weight[0]), dtype=torch.bfloat16)
    deep_gemm.fp8_gemm_nt((codes, scales), weight, out)
    return out


def aligned(scales: torch.Tensor) -> torch.Tensor:
    """Scales [M, K / 128] as DeepGEMM wants them, which vLLM's own quantisation writes at once."""
    from vllm.third_party import deep_gemm

    return deep_gemm.get_mn_major_tma_aligned_tensor(scales)


def require_near(call: Callable[[], torch.Tensor], want: torch.Tensor) -> None:
    """Raises ArithmeticError where a product is not the one wanted."""
    error = (call().float() - want.float()).norm() / want.float().norm()
    if not error < 0.02:
        raise ArithmeticError(f"off by {error:.3g}")


def compare_fp8(out: Path) -> None:
    compile_shipped()
    table = Table(out / "fp8.csv")
    refused: dict[str, str] = {}
    for m in BATCHES:
        for shape, (n, k) in SHAPES.items():
            held = [weights(n, k) for _ in range(copies(n * k))]
            codes, scales = quantise_rows(torch.randn(m, k, device="cuda").bfloat16())
            want = fp8_matmul(codes, scales, *held[0])
            variants: dict[str, list[Callable[[], object]]] = {
                "ours": [partial(fp8_matmul, codes, scales, *each) for each in held]
            }
            for name, call, layout in (
                ("cutlass", cutlass, lambda scales: scales),
                ("deep_gemm", deep_gemm, aligned),
            ):
                first = partial(_of_layout, call, layout, codes, scales, held[0])
                if reason := runs(partial(require_near, first, want)):
                    refused[name] = reason
                else:
                    given = layout(scales)
                    variants[name] = [partial(call, codes, given, each) for each in held]
            us = medians_us(variants)
            ratios = {
                f"{name}_ratio": us[name] / us["ours"] if name in us else ""
                for name in ("cutlass", "deep_gemm")
            }
            table.add(
                shape=shape, n=n, k=k, m=m, us=us["ours"], cutlass_us=us.get("cutlass", ""),
                deep_gemm_us=us.get("deep_gemm", ""), **ratios,
            )  # fmt: skip
    print_means(table, ("cutlass_ratio", "deep_gemm_ratio"))
    print(refused or "nothing was refused", flush=True)


def _of_layout(
    call: Callable[[torch.Tensor, torch.Tensor, Held], torch.Tensor],
    layout: Callable[[torch.Tensor], torch.Tensor],
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: Held,
) -> torch.Tensor:
    return call(codes, layout(scales), weight)


class Marlin:
    """Weights [N, K] of 4 bits as Marlin lays them out."""

    def __init__(self, n: int, k: int) -> None:
        from vllm.model_executor.layers.quantization.utils import marlin_utils
        from vllm.scalar_type import scalar_types

        self.n, self.k, self.type = n, k, scalar_types.uint4b8
        self.workspace = marlin_utils.marlin_make_workspace_new(torch.device("cuda", 0))

    def draw(self) -> Held:
        """Any codes: the time of a product does not follow them."""
        size = (self.k // 16, self.n * 2)
        codes = torch.randint(-(1 << 31), (1 << 31) - 1, size, device="cuda", dtype=torch.int32)
        return codes, (torch.rand(self.k // GROUP, self.n, device="cuda") * 0.004).bfloat16()

    def product(self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        from vllm import _custom_ops as ops

        none: Any = None
        return ops.marlin_gemm(
            x, none, codes, none, scales, none, none, none, none, none, self.workspace, self.type,
            len(x), self.n, self.k, is_k_full=True, use_fp32_reduce=True,
        )  # fmt: skip

    def check(self, x: torch.Tensor) -> None:
        """Raises ArithmeticError where a product is not that of the weight that was packed."""
        from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize

        plain = torch.randn(self.k, self.n, device="cuda").bfloat16()
        reference, codes, scales, *_ = marlin_quantize(plain, self.type, GROUP, act_order=False)
        require_near(partial(self.product, x, codes, scales), x @ reference)


def compare_int4(out: Path) -> None:
    table = Table(out / "int4.csv")
    Marlin(256, 512).check(torch.randn(16, 512, device="cuda").bfloat16())
    for m in (1, 8, 16, 32, 64, 256, 1024, 4096):
        for shape, (n, k) in SHAPES.items():
            marlin, x = Marlin(n, k), torch.randn(m, k, device="cuda").bfloat16()
            held = [draw(n, k) for _ in range(copies(n * k / 2))]
            theirs = [marlin.draw() for _ in held]
            us = medians_us({
                "ours": [partial(weight_only_matmul, x, each) for each in held],
                "marlin": [partial(marlin.product, x, *each) for each in theirs],
            })  # fmt: skip
            table.add(
                shape=shape, n=n, k=k, m=m, us=us["ours"], marlin_us=us["marlin"],
                marlin_ratio=us["marlin"] / us["ours"],
            )  # fmt: skip
    print_means(table, ("marlin_ratio",))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    compare_fp8(options.out)
    compare_int4(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
