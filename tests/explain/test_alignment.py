"""Where the probe's part of a tensor is, and whether a copy is the same to a kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.explain.alignment import Geometry, clone_exactly, equal_bits, max_ulp, write_exactly
from ndcheck.explain.recording import digest_rows

PREFILL = Geometry(3, 2, (5, 7), (9, 11))
DECODE = Geometry(3, 2, (1, 1), (9, 11))


@pytest.mark.parametrize(
    ("geometry", "alone", "loaded", "place"),
    [
        (PREFILL, (1, 5, 64), (3, 7, 64), (slice(1, 2), slice(2, 7), slice(0, 64))),
        (PREFILL, (1, 4, 5, 9), (3, 4, 7, 11), "1:2 0:4 2:7 2:11"),
        (PREFILL, (5, 64), (21, 64), "9:14 0:64"),  # rows and columns in one dimension
        (PREFILL, (4, 5, 64), (12, 7, 64), "4:8 2:7 0:64"),  # rows and heads in one
        (DECODE, (1, 1, 64), (3, 1, 64), "1:2 0:1 0:64"),
        (DECODE, (1, 2, 9, 64), (3, 2, 11, 64), "1:2 0:2 2:11 0:64"),
        (DECODE, (1, 1, 1, 9), (3, 1, 1, 11), "1:2 0:1 0:1 2:11"),
        (DECODE, (64,), (64,), "0:64"),
        (DECODE, (1, 13), (3, 17), None),
        (DECODE, (1, 13), (3, 1, 13), None),
    ],
)
def test_places(geometry, alone, loaded, place):
    if isinstance(place, str):
        place = tuple(slice(*map(int, part.split(":"))) for part in place.split())
    assert geometry.place(alone, loaded, slot=1) == place


def test_repeated_elements_are_written_once():
    """As keys are, that several heads share."""
    target = torch.zeros(3, 2, 1, 4).expand(3, 2, 5, 4)
    own = torch.ones(1, 2, 1, 4)
    place = (slice(1, 2), slice(0, 2), slice(0, 5), slice(0, 4))
    assert not write_exactly(target, place, own.repeat(1, 1, 5, 1))
    assert not target.any()
    assert write_exactly(target, place, own.expand(1, 2, 5, 4))
    assert target[1].all()
    assert not target[::2].any()


def test_a_copy_has_the_strides_and_alignment_of_the_original():
    base = torch.randn(7, 33)
    for tensor in (base[:, 1:], base.t(), base[2:5, ::3], base[:1].expand(4, -1), base[0, 5]):
        copy = clone_exactly(tensor)
        assert torch.equal(copy, tensor)
        assert copy.stride() == tensor.stride()
        assert copy.data_ptr() % 64 == tensor.data_ptr() % 64
        assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_ulp_counts_representable_steps(x):
    a = torch.tensor([x])
    up = torch.nextafter(a, torch.tensor([torch.inf]))
    assert max_ulp(a, a) == 0
    assert max_ulp(a, up) == (1 if x or up[0] else 0)


def test_ulp_crosses_zero_and_bits_do_not():
    assert max_ulp(torch.tensor([-0.0]), torch.tensor([0.0])) == 0
    assert not equal_bits(torch.tensor([-0.0]), torch.tensor([0.0]))
    assert equal_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert (
        max_ulp(torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([1.0, 2.03125]).bfloat16()) == 2
    )


def test_the_bits_of_a_single_element_are_read_at_any_stride():
    base = torch.arange(64.0).view(1, 64)
    for one in (base[:, 3], base[..., 3:4], base.t()[3:4]):
        assert equal_bits(one, torch.full(one.shape, 3.0))
        assert not equal_bits(one, torch.full(one.shape, 4.0))
        assert digest_rows([one]) == digest_rows([torch.tensor(3.0)])
