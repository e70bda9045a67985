"""The proofs: what they accept, what they refuse, and what happens to rows that fail them."""

from __future__ import annotations

import itertools

import pytest
import torch

from ndcheck_kernels import UnsupportedCallError
from ndcheck_kernels.cpu.proven_rows import BASE_ROWS, Probe, map_rows, same_bits

WIDTH = 200
unique = itertools.count()


def ordered_sum(rows, group):
    """Row sums with partial sums of `group` elements."""
    parts = [p.cumsum(-1)[:, -1:] for p in rows.split(group, -1)]
    return torch.cat(parts, -1).cumsum(-1)[:, -1:]


def probe_of(kernel):
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(BASE_ROWS, WIDTH // 2, generator=generator)
    rows = torch.cat([half, -half], -1)[:, torch.randperm(WIDTH, generator=generator)]
    return lambda: Probe((rows,), kernel)


def run(kernel, rows, steps=()):
    return map_rows((f"planted {next(unique)}",), kernel, (rows,), probe_of(kernel), steps)


@pytest.mark.parametrize("steps", [(), (64, 32)])
def test_rows_whose_number_changes_the_order_are_computed_in_base_tiles(
    noise_rows, find_violations, steps
):
    seen = set()

    def kernel(x):
        seen.add(len(x))
        return ordered_sum(x, 200 if len(x) in (16, 64) else 96)

    rows = noise_rows(WIDTH, torch.float32)
    identity = (f"planted {next(unique)}",)
    assert find_violations(kernel, rows) != []
    seen.clear()

    def mapped(x):
        return map_rows(identity, kernel, (x,), probe_of(kernel), steps)

    assert find_violations(mapped, rows) == []
    assert torch.equal(mapped(rows), ordered_sum(rows, 200))


def test_a_size_is_proven_once_and_then_used_whole(noise_rows):
    calls = []

    def kernel(x):
        calls.append(len(x))
        return ordered_sum(x, 64)

    rows = noise_rows(WIDTH, torch.float32)[:40]
    identity = (f"planted {next(unique)}",)
    for _ in range(3):
        map_rows(identity, kernel, (rows,), probe_of(kernel))
    # Three calls of the base tile and 18 of 40 rows prove it: 16 with another base row in each
    # place, as a row's sum is one number, and two beside NaN. Then three calls do the work.
    assert sorted(calls) == [16, 16, 16, *[40] * 21]


def test_a_kernel_that_follows_the_place_in_the_tile_is_refused(noise_rows):
    def kernel(x):
        return torch.cat([ordered_sum(x[:4], 200), ordered_sum(x[4:], 96)])

    with pytest.raises(UnsupportedCallError, match="other bits in another place"):
        run(kernel, noise_rows(WIDTH, torch.float32)[:20])


def test_a_kernel_that_reads_its_neighbours_is_refused(noise_rows):
    def kernel(x):
        return ordered_sum(x, 64) + x.roll(1, 0)[:, :1]

    with pytest.raises(UnsupportedCallError):
        run(kernel, noise_rows(WIDTH, torch.float32)[:20])


def test_rows_that_meet_their_neighbours_times_zero_are_computed_alone(noise_rows):
    """As AMX does beyond a row's end: nothing shows unless the neighbour is NaN."""

    def kernel(x):
        beyond = torch.cat([x[1:, :1], torch.zeros(1, 1)]) if len(x) > 16 else torch.zeros(1, 1)
        return ordered_sum(x, 64) + 0 * beyond

    rows = noise_rows(WIDTH, torch.float32)[:40]
    rows[1::2] = torch.nan
    result = run(kernel, rows)
    assert torch.equal(result[::2], ordered_sum(rows[::2], 64))


def test_same_bits_tells_zeros_apart_and_not_nans():
    nan = torch.tensor([torch.nan, 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.zeros(2), -torch.zeros(2))
