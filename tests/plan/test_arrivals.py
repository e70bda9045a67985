"""One notation for both clocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.errors import UsageError
from ndcheck.plan.arrivals import Arrivals, parse_arrivals, with_clock

NUMBERS = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("clock", ["step", "s"])
@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("together", {}),
        ("closed", {}),
        ("poisson:2.5", {"rate": 2.5}),
        ("poisson:2.5/{}", {"rate": 2.5}),
        ("bursts:4:0.5", {"burst_size": 4, "gap": 0.5}),
        ("bursts:4:0.5{}", {"burst_size": 4, "gap": 0.5}),
    ],
)
def test_arrivals_are_read(text, fields, clock):
    text = text.format(clock)
    assert parse_arrivals(text, clock) == Arrivals(text.partition(":")[0], clock, **fields)


@pytest.mark.parametrize("clock", ["step", "s"])
@pytest.mark.parametrize(
    "text",
    ["", "open", "closed:3", "together:", "closed/s", "poisson", "poisson:", "poisson:0",
     "poisson:-1", "poisson:inf", "poisson:nan", "poisson:x", "poisson:1/", "poisson:1/min",
     "bursts:2", "bursts:0:1", "bursts:2:nan", "bursts:2:1:1", "bursts:2:0s"],
)  # fmt: skip
def test_anything_else_is_not(text, clock):
    with pytest.raises(UsageError, match=f"--arrivals .*: give .*poisson:RATE/{clock} "):
        parse_arrivals(text, clock)
    assert with_clock(text, clock) == text


@pytest.mark.parametrize("text", ["poisson:1/{}", "bursts:2:1{}"])
@pytest.mark.parametrize(("clock", "other"), [("step", "s"), ("s", "step")])
def test_the_other_clock_is_refused(text, clock, other):
    with pytest.raises(UsageError, match="the clock here is"):
        parse_arrivals(text.format(other), clock)


@given(
    arrivals=st.sampled_from(["step", "s"]).flatmap(
        lambda clock: st.one_of(
            st.builds(Arrivals, st.sampled_from(["together", "closed"]), st.just(clock)),
            st.builds(Arrivals, st.just("poisson"), st.just(clock), rate=NUMBERS),
            st.builds(
                Arrivals,
                st.just("bursts"),
                st.just(clock),
                burst_size=st.integers(1, 1000),
                gap=NUMBERS,
            ),
        )
    )
)
def test_what_is_written_is_read_back(arrivals):
    assert parse_arrivals(str(arrivals), arrivals.clock) == arrivals
    assert parse_arrivals(arrivals.recorded, arrivals.clock) == arrivals
    assert with_clock(arrivals.recorded, arrivals.clock) == str(arrivals)
