"""The CPU implementations: importing this registers them."""

from functools import partial

import torch

from ndcheck_kernels import cpu_attention as cpu_attention
from ndcheck_kernels import cpu_gemm as cpu_gemm
from ndcheck_kernels import cpu_pointwise as cpu_pointwise
from ndcheck_kernels import cpu_reductions as cpu_reductions
from ndcheck_kernels import cpu_routing as cpu_routing
from ndcheck_kernels.cpu_pointwise import pointwise
from ndcheck_kernels.ops.complex_numbers import register_complex

register_complex(
    "cpu",
    partial(pointwise, torch.ops.aten.cos.default),
    partial(pointwise, torch.ops.aten.sin.default),
)
