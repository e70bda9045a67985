"""Functions of single elements, whose bits may follow an element's place: x [M, K] -> [M, K]."""

from collections.abc import Iterator

import torch

from ndcheck_kernels.measure.cases.case import (
    Call,
    Case,
    Draw,
    Ends,
    Form,
    Operands,
    Source,
    scaled_ends,
)


def _positive(k: int) -> Draw:
    def draw(source: Source, m: int, noise: bool) -> Operands:
        return Operands((source.wide(m, k).abs() + 2**-6,))

    return draw


def _pairs(k: int) -> Draw:
    """Float32, since torch has complex numbers of no less, in the range of the dtype."""

    def draw(source: Source, m: int, noise: bool) -> Operands:
        return Operands(tuple(source.wide(m, k).float() for _ in range(2)))

    return draw


def _pair_ends(k: int) -> Ends:
    def ends(source: Source, m: int) -> Iterator[tuple[str, Operands]]:
        x, y = _pairs(k)(source, m, False).rows
        for name, factor in (("the largest", 2.0**50), ("the smallest", 2.0**-50)):
            yield f"{name} operands", Operands((x * factor, y))

    return ends


def _polar(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(torch.polar(x.abs(), y)).flatten(1)


def _polar_reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x, y = x.double().abs(), y.double()
    return torch.stack([x * y.cos(), x * y.sin()], -1).flatten(1)


def _complex_mul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a, b = (torch.complex(t, t.flip(-1)) for t in (x, y))
    return torch.view_as_real(a * b).flatten(1)


def _complex_mul_reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    (a, b), (c, d) = ((t.double(), t.double().flip(-1)) for t in (x, y))
    return torch.stack([a * c - b * d, a * d + b * c], -1).flatten(1)


def _in_groups(call: Call) -> Call:
    """The planted fault of an op that sums nothing: one more rounding."""

    def grouped(groups: int, *operands: torch.Tensor) -> torch.Tensor:
        y = call(*operands)
        return y if groups == 1 else y * (1 + groups * torch.finfo(y.dtype).eps)

    return grouped


def elements(k: int, device_type: str) -> tuple[Case, ...]:
    """Complex arithmetic on any device; on a CPU also real functions, which its loops round
    differently in a vector and in a loop's tail.
    """
    complex_cases = tuple(
        Case(op, str(k), fires, _pairs(k), call, reference, _in_groups(call), ends=_pair_ends(k))
        for op, fires, call, reference in (
            ("polar", "polar", _polar, _polar_reference),
            ("complex_mul", "mul", _complex_mul, _complex_mul_reference),
        )
    )
    if device_type != "cpu":
        return complex_cases
    powers = tuple(
        Form(
            f"to the power of {exponent}",
            lambda x, e=exponent: x**e,
            lambda x, e=exponent: x.double() ** e,
        )
        for exponent in (2, 3, -0.5)
    )
    return (
        *complex_cases,
        Case(
            "rsqrt", str(k), "rsqrt", _positive(k), torch.rsqrt, lambda x: x.double().rsqrt(),
            _in_groups(torch.rsqrt), ends=scaled_ends(_positive(k), 1),
        ),
        Case(
            "pow", str(k), "pow", _positive(k), lambda x: x**1.5, lambda x: x.double() ** 1.5,
            _in_groups(lambda x: x**1.5), forms=powers, ends=scaled_ends(_positive(k), 1),
        ),
    )  # fmt: skip
