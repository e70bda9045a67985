"""What carries a state from token to token, by the Triton kernels: importing this registers it."""

from ndcheck_kernels.cuda.overrides import covered
from ndcheck_kernels.cuda.recurrent import selective_scan, short_convolution
from ndcheck_kernels.ops.selective_scan import scan_op
from ndcheck_kernels.ops.short_convolution import short_convolution_op, short_convolution_step_op
from ndcheck_kernels.scope.registry import implements

implements(short_convolution_op, device="cuda")(covered(short_convolution.short_convolution))
implements(short_convolution_step_op, device="cuda")(
    covered(short_convolution.short_convolution_step)
)
implements(scan_op, device="cuda")(covered(selective_scan.selective_scan))
