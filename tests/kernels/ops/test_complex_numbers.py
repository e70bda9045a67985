"""Complex rotations on CPU: an element's bits depend on it alone."""

from __future__ import annotations

import pytest
import torch

from ndcheck_kernels import UncoveredOpError, invariant_kernels


def rotate(rows):
    """Llama 4's rotation: numbers turned by an angle of their own."""
    with invariant_kernels():
        numbers = torch.view_as_complex(torch.stack([rows, rows.flip(-1)], -1))
        turned = numbers * torch.polar(torch.ones_like(rows), rows.roll(1, -1)) * 0.5
        return torch.view_as_real(turned).flatten(-2)


def test_a_rotation_does_not_depend_on_its_place(noise_rows, find_violations):
    assert find_violations(rotate, noise_rows(37, torch.float32)) == []


def test_a_rotation_is_accurate(noise_rows):
    rows = noise_rows(37, torch.float32).clamp(-8, 8)
    exact = rows.double()
    numbers = torch.view_as_complex(torch.stack([exact, exact.flip(-1)], -1))
    expected = numbers * torch.polar(torch.ones_like(exact), exact.roll(1, -1)) * 0.5
    error = torch.view_as_complex(rotate(rows).double().unflatten(-1, (-1, 2))) - expected
    assert (error.abs() <= 4 * torch.finfo(torch.float32).eps * numbers.abs()).all()


@pytest.mark.parametrize("op", [torch.abs, torch.reciprocal, lambda z: z / z, torch.exp])
def test_other_complex_arithmetic_is_refused(op):
    with invariant_kernels(), pytest.raises(UncoveredOpError):
        op(torch.complex(torch.ones(3), torch.ones(3)))


def test_an_op_that_conjugates_by_itself_is_refused_by_name():
    """Taken apart, vecdot multiplies a tensor that is only marked as conjugate."""
    x = torch.complex(torch.arange(6.0).view(2, 3), torch.ones(2, 3))
    with pytest.raises(UncoveredOpError, match="sum"), invariant_kernels():
        torch.linalg.vecdot(x, x)
