"""When requests are sent."""

from __future__ import annotations

import asyncio

from ndcheck.plan.arrivals import Arrivals
from ndcheck.records import Load
from ndcheck.samplers.endpoint.arrivals import run_trial


def test_offsets_of_open_loops():
    load = Load(5, (0,), (3,) * 4, filler_seed=1)
    assert Arrivals("bursts", "s", burst_size=2, gap=0.5).offsets(load) == [0, 0, 0.5, 0.5, 1.0]
    poisson = Arrivals("poisson", "s", rate=100.0)
    offsets = poisson.offsets(load)
    assert offsets == sorted(offsets) == poisson.offsets(load)
    assert offsets[0] == 0
    assert offsets[-1] > 0


def run(load, arrival, n_turns=lambda row, number: 3 + row, works=lambda row, number: True):
    """The most requests in flight at once, and what was sent in order."""
    in_flight, most, sent = 0, 0, []

    async def request(name, turns):
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        sent.append(name)
        for _ in range(turns):
            await asyncio.sleep(0)
        in_flight -= 1

    async def filler(row, number):
        await request((row, number), n_turns(row, number))
        return works(row, number)

    probes = [lambda i=i: request(f"probe {i}", 19) for i in range(len(load.slots))]
    asyncio.run(run_trial(load, arrival, probes, filler))
    return most, sent


def test_together_sends_each_row_once_in_row_order():
    most, sent = run(Load(4, (2,), (1, 1, 1)), Arrivals("together", "s"), lambda row, number: 30)
    assert most == 4
    assert sent == [(0, 0), (1, 0), "probe 0", (3, 0)]


def test_a_filler_that_ends_before_the_probe_is_replaced():
    most, sent = run(Load(3, (0,), (1, 1)), Arrivals("together", "s"))
    assert most == 3
    assert [name for name in sent if name == "probe 0"] == ["probe 0"]
    assert len(sent) > 6
    assert len(set(sent)) == len(sent)


def test_a_filler_that_fails_is_not_sent_for_ever():
    _, sent = run(Load(3, (0,), (1, 1)), Arrivals("together", "s"), works=lambda row, number: False)
    assert sorted(map(str, sent)) == ["(1, 0)", "(2, 0)", "probe 0"]


def test_an_open_loop_is_not_refilled():
    load = Load(3, (0,), (1, 1), filler_seed=1)
    _, sent = run(load, Arrivals("poisson", "s", rate=1e6))
    assert len(sent) == 3


def test_a_closed_loop_keeps_its_number_in_flight_until_the_last_probe():
    most, sent = run(Load(6, (0, 3), (1,) * 4, filler_seed=5), Arrivals("closed", "s"))
    assert most == 6
    assert sent.count("probe 0") == sent.count("probe 1") == 1
    assert len(sent) > 6
    assert len(set(sent)) == len(sent)  # no filler is sent twice
