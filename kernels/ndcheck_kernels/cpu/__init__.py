"""The CPU implementations: importing this registers them."""

from functools import partial

import torch

from ndcheck_kernels.cpu import attention as attention
from ndcheck_kernels.cpu import block_fp8 as block_fp8
from ndcheck_kernels.cpu import gated_delta as gated_delta
from ndcheck_kernels.cpu import pointwise
from ndcheck_kernels.cpu import products as products
from ndcheck_kernels.cpu import reductions as reductions
from ndcheck_kernels.cpu import routing as routing
from ndcheck_kernels.cpu import row_fp8 as row_fp8
from ndcheck_kernels.cpu import selective_scan as selective_scan
from ndcheck_kernels.cpu import short_convolution as short_convolution
from ndcheck_kernels.cpu import weight_only as weight_only
from ndcheck_kernels.ops.complex_numbers import register_complex
from ndcheck_kernels.scope.extremes import register_extremes

register_extremes("cpu")
register_complex(
    "cpu",
    partial(pointwise.pointwise, torch.ops.aten.cos.default),
    partial(pointwise.pointwise, torch.ops.aten.sin.default),
)
