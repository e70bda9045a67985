from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from ndcheck.records import Load
from ndcheck.reports import figures
from ndcheck.reports.figures import bins, gather, histogram


def test_counts_are_those_of_the_samples(two_arms) -> None:
    found = gather(two_arms)
    stock = found["stock", "p1"]
    assert stock.divergences == {102: 8, 110: 2}
    assert stock.unique_by_load == {("neighbours", 3): {1, 2, 3}}
    assert stock.unique_by_batch_size == {3: 3}
    assert len(stock.rows) == 200
    assert {row.completion_id for row in stock.rows} == {1, 2, 3}
    assert [position for position, _ in stock.forks] == [102, 110]
    invariant = found["invariant", "p1"]
    assert not invariant.divergences
    assert invariant.forks == []


def test_the_histogram_holds_every_diverged_sample(two_arms) -> None:
    arms = list(gather(two_arms).values())
    edges = bins(arms)
    assert len({b - a for a, b in pairwise(edges)}) == 1
    assert len(edges) <= figures.MAX_BINS + 2
    counts = histogram(arms[0], edges)
    assert sum(counts) == 10
    assert counts[102 // edges[1]] == 8
    assert sum(histogram(arms[1], edges)) == 0


def test_speed_is_tokens_over_time(failing) -> None:
    speeds = gather(failing)["stock", "p1"].tokens_per_s
    assert speeds[4] == pytest.approx(413.2 * 4)
    assert list(speeds) == [1, 2, 4, 8, 16]


def test_many_samples_are_thinned_evenly(failing, monkeypatch) -> None:
    monkeypatch.setattr(figures, "MAX_ROWS", 100)
    rows = gather(failing)["stock", "p1"].rows
    assert [row.sample_id for row in rows] == list(range(0, 1000, 10))


def test_reference_margins_are_the_probes_alone(failing) -> None:
    first = replace(
        failing.samples[0],
        purpose="reference",
        baseline=None,
        load=Load(1),
        margins=(1.5, float("inf"), 0.25),
    )
    samples = [first, *failing.samples[1:]]
    margins = gather(replace(failing, samples=samples))["stock", "p1"].reference_margins
    assert margins[0] == 1.5
    assert margins[1] != margins[1]  # no runner-up: unknown


def test_samples_that_do_not_fit_the_summary_are_refused(failing) -> None:
    with pytest.raises(ValueError, match="zip"):
        gather(replace(failing, samples=failing.samples[1:]))
