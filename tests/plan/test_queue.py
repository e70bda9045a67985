"""The queue: seeded, endless where others keep the load's rows company, and timed in steps."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.plan.arrivals import parse_arrivals
from ndcheck.plan.queue import queue_requests
from ndcheck.records import Load

KINDS = ("closed", "together", "poisson:0.5/step", "bursts:3:4step")


def queue(load, arrivals="closed", max_tokens=40, n=200):
    return list(islice(queue_requests(load, parse_arrivals(arrivals, "step"), 7, max_tokens), n))


@given(
    arrivals=st.sampled_from(KINDS),
    batch_size=st.integers(2, 12),
    data=st.data(),
    seed=st.integers(0, 2**31),
    max_tokens=st.integers(1, 60),
)
def test_the_rows_of_a_load_come_in_order_and_the_rest_is_company(
    arrivals, batch_size, data, seed, max_tokens
):
    n_fillers = data.draw(st.integers(0, batch_size - 1))
    rows = data.draw(st.permutations(range(batch_size)))
    slots = tuple(sorted(rows[n_fillers:]))
    lengths = tuple(range(3, 3 + n_fillers))
    load = Load(batch_size, slots, lengths, seed)
    requests = queue(load, arrivals, max_tokens)
    assert requests == queue(load, arrivals, max_tokens)
    assert [r.slot for r in requests if r.slot is not None] == list(range(batch_size))
    assert [r.slot for r in requests if r.is_probe] == list(slots)
    fillers = [r for r in requests if r.slot is not None and not r.is_probe]
    assert [(r.filler_seed, r.n_prompt_tokens) for r in fillers] == [
        (seed + i, length) for i, length in enumerate(lengths)
    ]
    assert all(r.max_tokens == max_tokens for r in requests if r.is_probe)
    assert all(1 <= r.max_tokens <= max_tokens for r in requests)
    times = [r.arrives_at for r in requests]
    assert times == sorted(times)
    company = [r for r in requests if r.slot is None]
    assert {r.n_prompt_tokens for r in company} <= {*(lengths or (7,))}
    assert len(requests) == (batch_size if arrivals == "together" else 200)


def test_who_comes_when():
    load = Load(4, (0, 1, 2, 3), filler_seed=1)
    closed = queue(load)
    assert [r.slot for r in closed[:9]] == [None] * 4 + [0, 1, 2, 3] + [None]
    assert len({r.max_tokens for r in closed[:4]}) > 1
    assert {r.arrives_at for r in closed} == {0.0}
    poisson = queue(load, "poisson:0.5/step", n=2000)
    assert [r.slot for r in poisson[:5]] == [0, 1, 2, 3, None]
    assert poisson[-1].arrives_at == pytest.approx(2000 / 0.5, rel=0.1)
    assert queue(Load(4, (0, 1, 2, 3), filler_seed=2), "poisson:0.5/step") != poisson[:200]


def test_bursts_come_by_the_step():
    load = Load(4, (0, 1, 2, 3), filler_seed=1)
    bursts = queue(load, "bursts:3:4step", n=8)
    assert [r.arrives_at for r in bursts] == [0, 0, 0, 4, 4, 4, 8, 8]


@pytest.mark.parametrize("arrivals", KINDS)
def test_a_probe_alone_has_no_company(arrivals):
    (request,) = queue(Load(1), arrivals)
    assert (request.slot, request.filler_seed, request.max_tokens) == (0, None, 40)
