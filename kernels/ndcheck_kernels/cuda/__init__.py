"""The CUDA implementations: importing this registers them."""

from ndcheck_kernels.cuda import block_fp8 as block_fp8
from ndcheck_kernels.cuda import experts as experts
from ndcheck_kernels.cuda import overrides as overrides
from ndcheck_kernels.cuda import recurrences as recurrences
from ndcheck_kernels.cuda import row_fp8 as row_fp8
from ndcheck_kernels.cuda import weight_only as weight_only
