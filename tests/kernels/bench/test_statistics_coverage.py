"""The simulation of runs, with a few of them: the control, and an interval that holds the rate."""

from __future__ import annotations

from bench.measurement.statistics_coverage import (
    attribution,
    by_load,
    coverage,
    neighbours_only,
)


def test_neighbours_at_fault_are_blamed_and_not_chance():
    found = attribution("in process", neighbours_only(0.3), 3)
    assert found["failed"] == found["to_another_property"] == 3


def test_an_interval_is_found_for_a_rate_by_load():
    found = coverage("in process", by_load(0.5), 60, 3)
    assert found["coverage"] > 0
