"""What each op is measured on: operands for any number of rows, the call, its specification.

A case calls torch's own op, so one case serves both arms, inside `invariant_kernels()` and outside,
on any device. Two kinds of operands: *noise*, whose result is little but rounding, so that another
order of summation shows in its bits, and *wide*, of wide range, for accuracy and time. Random
operands alone would hide an order: rounding to bfloat16 removes what it changes. The wide ones come
at both ends of the dtype's range as well, and to every `Form` of the call: faults hide in arguments
that are left out, and in steps that are rounded on the way.
"""

from itertools import starmap

from ndcheck_kernels.measure.cases.attention import attention
from ndcheck_kernels.measure.cases.case import Call, Case, FixedSource, Form, Operands, Source
from ndcheck_kernels.measure.cases.elements import elements
from ndcheck_kernels.measure.cases.products import products
from ndcheck_kernels.measure.cases.rows import row_ops

__all__ = [
    "TIMED",
    "Call",
    "Case",
    "FixedSource",
    "Form",
    "Operands",
    "Source",
    "checked_cases",
    "manifest_cases",
    "timed_cases",
]

TIMED = (
    *("linear", "addmm", "bmm", "sum", "mean", "softmax", "log_softmax", "logsumexp"),
    *("layer_norm", "rms_norm", "cumsum", "argmax", "decode", "prefill"),
)
"""The other ops are forms of these, with the same kernel."""


def _linear(n: int, k: int) -> Case:
    return products(n, k)[0]


def checked_cases(device_type: str) -> tuple[Case, ...]:
    """Every op once; on a GPU, products and rows also at the shapes that take other paths."""
    if device_type == "cuda":
        return (
            *products(6144, 4096),
            *starmap(_linear, ((4096, 12288), (1280, 8192), (8192, 1024), (256, 4104))),
            *row_ops(4096),
            # Nobody normalises a vocabulary: one tile holds no such row.
            *(c for c in row_ops(151936, max_rows=129) if not c.op.endswith("_norm")),
            *elements(4096, device_type),
            *attention(32, 8, 128, context=1024, prefill=256, max_rows=(129, 17)),
        )  # fmt: skip
    return (
        *products(256, 512),
        _linear(77, 254),
        *row_ops(4096),
        *elements(4096, device_type),
        *attention(2, 1, 64, context=260, prefill=140, max_rows=(17, 5)),
    )


def timed_cases(device_type: str) -> tuple[Case, ...]:
    """The ops that cost time, at shapes of an 8B on a GPU and of a small model on a CPU."""
    if device_type == "cuda":
        found = (
            *products(6144, 4096),
            *starmap(_linear, ((4096, 4096), (24576, 4096), (4096, 12288))),
            *row_ops(4096),
            *(c for c in row_ops(151936, 1024) if c.op in ("softmax", "log_softmax", "argmax")),
            *attention(32, 8, 128, context=4096, prefill=2048, max_rows=(256, 16)),
        )
    else:
        found = (
            *products(1024, 1024),
            *row_ops(1024),
            *attention(4, 2, 64, context=512, prefill=128, max_rows=(64, 4)),
        )
    return tuple(case for case in found if case.op in TIMED)


def manifest_cases(device_type: str) -> tuple[Case, ...]:
    """The ops of a decoder, small enough that all of them take seconds; with each K-grouping."""
    if device_type == "cuda":
        found = (
            *products(6144, 4096),
            *starmap(_linear, ((1280, 8192), (8192, 1024))),
            *row_ops(4096),
            *(c for c in row_ops(151936, max_rows=129) if c.op in ("log_softmax", "argmax")),
            *attention(32, 8, 128, context=1024, prefill=256, max_rows=(129, 17)),
        )
    else:
        found = (
            *products(256, 512),
            *starmap(_linear, ((64, 2048), (4096, 256))),
            *row_ops(4096),
            *attention(2, 1, 64, context=260, prefill=140, max_rows=(17, 5)),
        )
    return tuple(c for c in found if c.op in (*TIMED, "sdpa_decode", "sdpa_prefill"))
