"""Weights of 4 and 8 bits, and experts in MXFP4, on CUDA: importing this registers them."""

from ndcheck_kernels.cuda.overrides import covered
from ndcheck_kernels.cuda.products.mxfp4 import mxfp4_matmul
from ndcheck_kernels.cuda.products.weight_only import weight_only_matmul
from ndcheck_kernels.ops.mxfp4 import register_mxfp4
from ndcheck_kernels.ops.weight_only import register_weight_only

register_weight_only("cuda", covered(weight_only_matmul))
register_mxfp4("cuda", covered(mxfp4_matmul))
