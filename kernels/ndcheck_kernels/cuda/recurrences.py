"""What carries a state from token to token, by the Triton kernels: importing this registers it."""

from ndcheck_kernels.cuda.overrides import covered
from ndcheck_kernels.cuda.recurrent import gated_delta, selective_scan, short_convolution
from ndcheck_kernels.ops.gated_delta import gated_delta_op
from ndcheck_kernels.ops.selective_scan import scan_op
from ndcheck_kernels.ops.short_convolution import short_convolution_op, short_convolution_step_op
from ndcheck_kernels.scope.registry import implements

for op, launch in (
    (gated_delta_op, gated_delta.gated_delta_rule),
    (scan_op, selective_scan.selective_scan),
    (short_convolution_op, short_convolution.short_convolution),
    (short_convolution_step_op, short_convolution.short_convolution_step),
):
    implements(op, device="cuda")(covered(launch))
