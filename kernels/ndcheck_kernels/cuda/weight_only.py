"""Weights of 4 and 8 bits on CUDA: importing this registers them."""

from ndcheck_kernels.cuda.overrides import covered
from ndcheck_kernels.cuda.products.weight_only import weight_only_matmul
from ndcheck_kernels.ops.weight_only import register_weight_only

register_weight_only("cuda", covered(weight_only_matmul))
