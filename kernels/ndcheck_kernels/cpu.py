"""The CPU implementations: importing this registers them."""

from ndcheck_kernels import cpu_attention as cpu_attention
from ndcheck_kernels import cpu_complex as cpu_complex
from ndcheck_kernels import cpu_gemm as cpu_gemm
from ndcheck_kernels import cpu_pointwise as cpu_pointwise
from ndcheck_kernels import cpu_reductions as cpu_reductions
from ndcheck_kernels import cpu_routing as cpu_routing
