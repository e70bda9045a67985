"""Products of rows with a weight: x [M, K], w [N, K], bias [N] -> [M, N]."""

import torch
import torch.nn.functional as F

from ndcheck_kernels.measure.cases.case import Call, Case, Draw, Form, Operands, Source, scaled_ends
from ndcheck_kernels.measure.reference import addmm_reference, linear_reference

BATCH = 2  # items of the batched products


def _product_operands(n: int, k: int) -> Draw:
    """x [M, K]; w [N, K] and a bias [N], which is 0 beside noise, since it would swallow it."""

    def draw(source: Source, m: int, noise: bool) -> Operands:
        if not noise:
            return Operands((source.wide(m, k),), (source.normal(n, k), source.normal(n)))
        x, w = source.wide(m, k // 2), source.normal(n, k // 2)
        order = source.order(k)
        x, w = torch.cat([x, -x], 1)[:, order], torch.cat([w, w], 1)[:, order]
        return Operands((x,), (w, w.new_zeros(n)))

    return draw


def _batched_operands(n: int, k: int) -> Draw:
    """x [M, BATCH, K], w [BATCH, N, K], bias [N]."""

    def draw(source: Source, m: int, noise: bool) -> Operands:
        plain = _product_operands(n, k)(source, m, noise)
        (x,), (w, bias) = plain.rows, plain.fixed
        return Operands((torch.stack([x] * BATCH, 1),), (torch.stack([w] * BATCH), bias))

    return draw


def _product_in_groups(call: Call) -> Call:
    def grouped(groups: int, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        parts = zip(x.float().chunk(groups, -1), w.float().chunk(groups, -1), strict=True)
        total = sum(call(a.contiguous(), b.contiguous(), bias.float()) for a, b in parts)
        return total.to(x.dtype)  # type: ignore[union-attr]

    return grouped


def _mm_out(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, w.t(), out=x.new_empty(len(x), len(w)))


def _bmm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1)


def _baddbmm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(bias, x.transpose(0, 1), w.transpose(1, 2), beta=0.5, alpha=2).transpose(
        0, 1
    )


def _bmm_reference(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.stack([linear_reference(x[:, i], w[i]) for i in range(BATCH)], 1)


def _baddbmm_reference(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    left, right = x.transpose(0, 1), w.transpose(1, 2)
    return addmm_reference(bias, left, right, beta=0.5, alpha=2).transpose(0, 1)


def _linear_reference(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return linear_reference(x, w)


# op: what fires, the call, its reference.
_PRODUCTS: dict[str, tuple[str, Call, Call]] = {
    "linear": ("linear", lambda x, w, bias: F.linear(x, w), _linear_reference),
    "linear_bias": ("linear", F.linear, linear_reference),
    "mm": ("mm", lambda x, w, bias: torch.mm(x, w.t()), _linear_reference),
    "mm_out": ("mm", _mm_out, _linear_reference),
    "addmm": (
        "addmm",
        lambda x, w, bias: torch.addmm(bias, x, w.t(), beta=0.5, alpha=2),
        lambda x, w, bias: addmm_reference(bias, x, w.t(), beta=0.5, alpha=2),
    ),
    "matmul": ("matmul", lambda x, w, bias: (x[:, None] @ w.t())[:, 0], _linear_reference),
    "einsum": ("bmm", lambda x, w, bias: torch.einsum("mk,nk->mn", x, w), _linear_reference),
    "mv": (
        "mv",
        lambda x, w, bias: torch.mv(x, w[0]),
        lambda x, w, bias: linear_reference(x, w[0][None])[:, 0],
    ),
    "grouped_mm": (
        "_grouped_mm",
        lambda x, w, bias: torch._grouped_mm(
            x,
            w.t()[None].contiguous(),
            torch.tensor([len(x)], dtype=torch.int32, device=x.device),
        ),
        _linear_reference,
    ),
}
_FORMS = {
    "addmm": (
        Form("without beta and alpha", lambda x, w, b: torch.addmm(b, x, w.t()), linear_reference),
        Form(
            "with beta 0",
            lambda x, w, b: torch.addmm(b * torch.nan, x, w.t(), beta=0),
            _linear_reference,
        ),
        Form(
            "with a matrix to add",
            lambda x, w, b: torch.addmm(x[:, :1] + b, x, w.t(), alpha=-1),
            lambda x, w, b: addmm_reference(x[:, :1] + b, x, w.t(), alpha=-1),
        ),
    ),
    "mv": (
        Form(
            "as dot",
            lambda x, w, b: torch.stack([torch.dot(row, w[0]) for row in x]),
            lambda x, w, b: linear_reference(x, w[0][None])[:, 0],
            fires="dot",
        ),
    ),
    "baddbmm": (
        Form(
            "without beta and alpha",
            lambda x, w, b: torch.baddbmm(
                b, x.transpose(0, 1), w.transpose(1, 2)
            ).transpose(0, 1),
            lambda x, w, b: _bmm_reference(x, w, b) + b.double(),
        ),
    ),
}  # fmt: skip
_BATCHED: dict[str, tuple[str, Call, Call]] = {
    "bmm": ("bmm", _bmm, _bmm_reference),
    "baddbmm": ("baddbmm", _baddbmm, _baddbmm_reference),
}


def products(n: int, k: int) -> tuple[Case, ...]:
    """Every form of a product of rows with a weight [N, K]; K is even."""
    return tuple(
        Case(
            op, f"{n}x{k}", fires, operands(n, k), call, reference, _product_in_groups(call),
            flops_per_row=2 * batch * n * k, forms=_FORMS.get(op, ()),
            ends=scaled_ends(operands(n, k), k), terms=k,
        )
        for forms, operands, batch in (
            (_PRODUCTS, _product_operands, 1),
            (_BATCHED, _batched_operands, BATCH),
        )
        for op, (fires, call, reference) in forms.items()
    )  # fmt: skip
