"""Reductions, normalisations and orders: x [M, K], w [K], bias [K] -> [M, K] or [M]."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from ndcheck_kernels.measure.cases.case import (
    MOST_ROWS,
    Call,
    Case,
    Draw,
    Form,
    Operands,
    Source,
    scaled_ends,
    sum_in_groups,
)
from ndcheck_kernels.measure.reference import (
    cumsum_reference,
    layer_norm_reference,
    log_softmax_reference,
    logsumexp_reference,
    mean_reference,
    rms_norm_reference,
    softmax_reference,
    sum_reference,
    variance_reference,
    vector_norm_reference,
)

EPS = 1e-6

RowDraw = Callable[[Source, int, int], torch.Tensor]
OperandsFor = Callable[[int], Draw]


def _cancelling(source: Source, m: int, k: int) -> torch.Tensor:
    return source.cancelling(m, k)


def _running_out(source: Source, m: int, k: int) -> torch.Tensor:
    return source.running_out(m, k)


def _logits(source: Source, m: int, k: int) -> torch.Tensor:
    return source.absorbing(m, k, 0, -10, -8)


def _steep_logits(source: Source, m: int, k: int) -> torch.Tensor:
    """Their exponentials are near half a unit in the last place of the first one's, 1.

    Some 4096 of them, spread over the row: of more, the sum is so far above 1 that bfloat16's
    rounding of its logarithm hides the order. The others' exponentials are 0.
    """
    rows = source.absorbing(m, k, 0, -17.5, -16.5)
    is_left_out = torch.arange(k, device=rows.device) % max(1, k // 4096) != 0
    return rows.masked_fill(is_left_out, -200)


def _outlier(source: Source, m: int, k: int) -> torch.Tensor:
    """Their squares are just below half a unit in the last place of the first two's."""
    rows = source.absorbing(m, k, 0, 0.7, 1)
    rows[:, 2::2] *= -1  # the mean is near 0
    # Another scale in each row, of few enough bits for bfloat16.
    rows[:, 0] = 4128 + 32 * source.order(m).remainder(50)
    rows[:, 1] = -rows[:, 0]
    return rows


def _levels(source: Source, m: int, k: int) -> torch.Tensor:
    return source.levels(m, k)


def _rows(noise_rows: RowDraw) -> OperandsFor:
    """For ops without weights."""

    def for_width(k: int) -> Draw:
        def draw(source: Source, m: int, noise: bool) -> Operands:
            tied = noise_rows is _levels
            x = noise_rows(source, m, k) if noise or tied else source.wide(m, k)
            return Operands((x,), (source.normal(k), source.normal(k)))

        return draw

    return for_width


def _normalised(reference: Call) -> OperandsFor:
    """For a normalisation, whose weights make noise visible: one of the rows meets each near a tie
    between two values of the dtype.
    """

    def for_width(k: int) -> Draw:
        def draw(source: Source, m: int, noise: bool) -> Operands:
            if not noise:
                return Operands((source.wide(m, k),), (source.normal(k), source.normal(k)))
            x = _outlier(source, m, k)
            column = torch.arange(k, device=source.device)
            values = reference(x)[column % m, column]
            weight = _near_ties(values, source.dtype)
            return Operands((x,), (weight, torch.zeros_like(weight)))

        return draw

    return for_width


def _near_ties(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """For each float64 value the weight that brings the product nearest to half way between two
    values of the dtype, so that the slightest change rounds to the other.
    """
    weights = 1 + torch.arange(128, device=values.device, dtype=torch.float64) / 128
    products = values[:, None] * weights
    unit = torch.finfo(dtype).eps * products.abs().log2().floor().exp2()
    return weights[(products.abs() / unit % 1 - 0.5).abs().argmin(-1)].to(dtype)


def _softmax_in(groups: int, x: torch.Tensor) -> torch.Tensor:
    powers = (x.float() - x.float().amax(-1, keepdim=True)).exp()
    return powers / sum_in_groups(groups, powers)


def _logsumexp_in(groups: int, x: torch.Tensor) -> torch.Tensor:
    top = x.float().amax(-1, keepdim=True)
    return top + sum_in_groups(groups, (x.float() - top).exp()).log()


def _rms_norm_in(groups: int, x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return wide / (sum_in_groups(groups, wide * wide) / x.shape[-1] + EPS).sqrt()


def _centred_in(groups: int, x: torch.Tensor) -> torch.Tensor:
    return x.float() - sum_in_groups(groups, x) / x.shape[-1]


def _cumsum_in(groups: int, x: torch.Tensor) -> torch.Tensor:
    parts = [part.cumsum(-1) for part in x.float().chunk(groups, -1)]
    for before, part in pairwise(parts):
        part += before[:, -1:]
    return torch.cat(parts, -1).to(x.dtype)


def _last_index(groups: int, x: torch.Tensor) -> torch.Tensor:
    """The fault of an exact op: of equal values, the last one's index."""
    return x.argmax(-1) if groups == 1 else x.shape[-1] - 1 - x.flip(-1).argmax(-1)


# op: what it is called on, the call, its reference, its planted fault.
_ROW_OPS: dict[str, tuple[OperandsFor, Call, Call, Call]] = {
    "sum": (
        _rows(_cancelling),
        lambda x, w, b: x.sum(-1),
        lambda x, w, b: sum_reference(x, -1),
        lambda groups, x, w, b: sum_in_groups(groups, x).to(x.dtype),
    ),
    "cumsum": (
        _rows(_running_out),
        lambda x, w, b: x.cumsum(-1),
        lambda x, w, b: cumsum_reference(x),
        lambda groups, x, w, b: _cumsum_in(groups, x),
    ),
    "log_softmax": (
        _rows(_steep_logits),
        lambda x, w, b: x.log_softmax(-1),
        lambda x, w, b: log_softmax_reference(x),
        lambda groups, x, w, b: (x.float() - _logsumexp_in(groups, x)).to(x.dtype),
    ),
    "logsumexp": (
        _rows(_steep_logits),
        lambda x, w, b: x.logsumexp(-1),
        lambda x, w, b: logsumexp_reference(x),
        lambda groups, x, w, b: _logsumexp_in(groups, x).to(x.dtype),
    ),
    "layer_norm": (
        _normalised(partial(layer_norm_reference, eps=EPS)),
        lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS),
        lambda x, w, b: layer_norm_reference(x, w, b, EPS),
        lambda groups, x, w, b: (_rms_norm_in(groups, _centred_in(groups, x)) * w + b).to(x.dtype),
    ),
    "rms_norm": (
        _normalised(partial(rms_norm_reference, eps=EPS)),
        lambda x, w, b: F.rms_norm(x, w.shape, w, EPS),
        lambda x, w, b: rms_norm_reference(x, w, EPS),
        lambda groups, x, w, b: (_rms_norm_in(groups, x) * w).to(x.dtype),
    ),
    # These give float32: in less, rounding would hide the order of terms that do not cancel, and
    # underflow that of a mean.
    "mean": (
        _rows(_cancelling),
        lambda x, w, b: x.mean(-1, dtype=torch.float32),
        lambda x, w, b: mean_reference(x, -1),
        lambda groups, x, w, b: sum_in_groups(groups, x) / x.shape[-1],
    ),
    "softmax": (
        _rows(_logits),
        lambda x, w, b: x.softmax(-1, dtype=torch.float32),
        lambda x, w, b: softmax_reference(x),
        lambda groups, x, w, b: _softmax_in(groups, x),
    ),
    "var": (
        _rows(_outlier),
        lambda x, w, b: x.float().var(-1, correction=0),
        lambda x, w, b: variance_reference(x, 0),
        lambda groups, x, w, b: sum_in_groups(groups, _centred_in(groups, x).square()),
    ),
    "std": (
        _rows(_outlier),
        lambda x, w, b: x.float().std(-1, correction=0),
        lambda x, w, b: variance_reference(x, 0).sqrt(),
        lambda groups, x, w, b: sum_in_groups(groups, _centred_in(groups, x).square()).sqrt(),
    ),
    "vector_norm": (
        _rows(_outlier),
        lambda x, w, b: torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32),
        lambda x, w, b: vector_norm_reference(x),
        lambda groups, x, w, b: sum_in_groups(groups, x.float().square()).sqrt(),
    ),
    "argmax": (
        _rows(_levels),
        lambda x, w, b: x.argmax(-1),
        lambda x, w, b: x.double().argmax(-1),
        lambda groups, x, w, b: _last_index(groups, x),
    ),
}
_FIRES = {"vector_norm": "linalg_vector_norm"}

# What the cases above leave out or give, and the op's other names.
_FORMS: dict[str, tuple[Form, ...]] = {
    "sum": (
        Form(
            "with dtype",
            lambda x, w, b: x.sum(-1, dtype=torch.float32),
            lambda x, w, b: sum_reference(x, -1),
        ),
    ),
    "mean": (
        Form("without dtype", lambda x, w, b: x.mean(-1), lambda x, w, b: mean_reference(x, -1)),
    ),
    "cumsum": (
        Form(
            "with dtype",
            lambda x, w, b: x.cumsum(-1, dtype=torch.float32),
            lambda x, w, b: cumsum_reference(x),
        ),
    ),
    "softmax": (
        Form("without dtype", lambda x, w, b: x.softmax(-1), lambda x, w, b: softmax_reference(x)),
        Form(
            "as _softmax",
            lambda x, w, b: torch._softmax(x, -1, False),
            lambda x, w, b: softmax_reference(x),
            fires="_softmax",
        ),
    ),
    "log_softmax": (
        Form(
            "with dtype",
            lambda x, w, b: x.log_softmax(-1, dtype=torch.float32),
            lambda x, w, b: log_softmax_reference(x),
        ),
        Form(
            "as _log_softmax",
            lambda x, w, b: torch._log_softmax(x, -1, False),
            lambda x, w, b: log_softmax_reference(x),
            fires="_log_softmax",
        ),
    ),
    "layer_norm": (
        Form(
            "without weight, bias and eps",
            lambda x, w, b: F.layer_norm(x, w.shape),
            lambda x, w, b: layer_norm_reference(x),
        ),
        Form(
            "without bias",
            lambda x, w, b: F.layer_norm(x, w.shape, w),
            lambda x, w, b: layer_norm_reference(x, w),
        ),
        Form(
            "without weight",
            lambda x, w, b: F.layer_norm(x, w.shape, None, b),
            lambda x, w, b: layer_norm_reference(x, None, b),
        ),
        Form(
            "as native_layer_norm",
            lambda x, w, b: torch.native_layer_norm(x, w.shape, w, b, EPS)[0],
            lambda x, w, b: layer_norm_reference(x, w, b, EPS),
            fires="native_layer_norm",
        ),
    ),
    "rms_norm": (
        Form(
            "without weight and eps",
            lambda x, w, b: F.rms_norm(x, w.shape),
            lambda x, w, b: rms_norm_reference(x, eps=None),
        ),
        Form(
            "without eps",
            lambda x, w, b: F.rms_norm(x, w.shape, w),
            lambda x, w, b: rms_norm_reference(x, w, None),
        ),
        Form(
            "as _fused_rms_norm",
            lambda x, w, b: torch.ops.aten._fused_rms_norm(x, w.shape, w, None)[0],
            lambda x, w, b: rms_norm_reference(x, w, None),
            fires="_fused_rms_norm",
        ),
    ),
    "var": (
        Form(
            "without correction", lambda x, w, b: x.var(-1), lambda x, w, b: variance_reference(x)
        ),
        Form(
            "as var_mean",
            lambda x, w, b: torch.stack(torch.var_mean(x, -1), -1),
            lambda x, w, b: torch.stack([variance_reference(x), mean_reference(x, -1)], -1),
            fires="var_mean",
        ),
    ),
    "std": (
        Form(
            "without correction",
            lambda x, w, b: x.std(-1),
            lambda x, w, b: variance_reference(x).sqrt(),
        ),
        Form(
            "as std_mean",
            lambda x, w, b: torch.stack(torch.std_mean(x, -1), -1),
            lambda x, w, b: torch.stack([variance_reference(x).sqrt(), mean_reference(x, -1)], -1),
            fires="std_mean",
        ),
    ),
    "vector_norm": (
        Form(
            "without dtype",
            lambda x, w, b: torch.linalg.vector_norm(x, dim=-1),
            lambda x, w, b: vector_norm_reference(x),
        ),
        Form(
            "of order 1",
            lambda x, w, b: torch.linalg.vector_norm(x, 1, dim=-1),
            lambda x, w, b: vector_norm_reference(x, 1),
        ),
    ),
}


def row_ops(k: int, max_rows: int = MOST_ROWS) -> tuple[Case, ...]:
    """Reductions, normalisations and orders over rows of even K."""
    return tuple(
        Case(
            op, str(k), _FIRES.get(op, op), operands_for(k), call, reference, grouped,
            max_rows=max_rows, forms=_FORMS.get(op, ()), ends=scaled_ends(operands_for(k), k),
            terms=k,
        )
        for op, (operands_for, call, reference, grouped) in _ROW_OPS.items()
    )  # fmt: skip
