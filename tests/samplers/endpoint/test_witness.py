"""The batch that ran, token by token: gauges of several engines, and streams that overlap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.samplers.endpoint.answers.answer import Answer, Arrival
from ndcheck.samplers.endpoint.witness import (
    batch_sizes_read,
    batch_sizes_seen,
    find_streams,
    most_of_the_time,
    read_gauge,
)

PAGE = b"""# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a b"} 3.0
vllm:num_requests_running{engine="1",model_name="a b"} 5.0
vllm:num_requests_running_total 99
llamacpp:requests_processing 7
broken:gauge NaN
huge:gauge 1e300
infinite:gauge 1e999
"""


@pytest.mark.parametrize(
    ("gauge", "value"),
    [
        ("vllm:num_requests_running", 5),  # engines do not share batches
        ("llamacpp:requests_processing", 7),
        ("sglang:num_running_reqs", None),
        ("broken:gauge", None),
        ("huge:gauge", None),
        ("infinite:gauge", None),
    ],
)
def test_a_gauge_is_read_for_the_largest_engine(gauge, value):
    assert read_gauge(PAGE, gauge) == value


def streams(*arrivals):
    return find_streams(Answer(arrivals=[Arrival(s, 0, 0, 0) for s in own]) for own in arrivals)


def spans(*pairs):
    """Streams of ten steps each."""
    return streams(*([a + (b - a) * i / 10 for i in range(11)] for a, b in pairs))


STEPS = [float(t) for t in range(24)]


def test_company_that_leaves_is_company_for_the_tokens_before_alone():
    """The arrivals of one step are spread: which of its rows comes first is an accident."""
    answers = spans((0.0, 23.0), (0.1, 5.1), (0.2, 4.9))
    sizes = batch_sizes_seen(STEPS, answers)
    assert sizes == [3] * 6 + [1] * 18
    assert most_of_the_time(sizes) == 1


def test_answers_one_after_the_other_do_not_overlap():
    assert batch_sizes_seen([0.0, 1.0], spans((0, 1), (1, 2), (2, 3))) == [1, 1]


def test_answers_in_one_piece_are_no_evidence():
    assert batch_sizes_seen([0.0, 0.0], spans((0, 0), (0, 0))) == []
    assert batch_sizes_seen([], spans((0, 1))) == streams([]) == []
    assert batch_sizes_read([], [(0.0, 3)]) == []
    assert batch_sizes_read(STEPS, []) == []


def test_tokens_of_one_event_share_its_step():
    sizes = batch_sizes_seen([0.0, 0.0, 4.0, 4.0, 4.0], spans((0.0, 4.0), (3.0, 9.0)))
    assert sizes == [1, 1, 1, 1, 1]


def test_answers_that_wait_after_their_first_token_are_no_company():
    one, two = [float(t) for t in range(8)], [0.1, *(8.0 + t for t in range(7))]
    assert batch_sizes_seen(one, streams(one, two)) == [1] * 8
    assert batch_sizes_seen(two, streams(one, two)) == [2, 2, 1, 1, 1, 1, 1, 1]


def test_a_step_that_is_long_for_all_is_no_pause():
    one, two = [0.0, 0.1, 5.0, 5.1], [0.05, 0.15, 4.95, 5.05]
    assert batch_sizes_seen(one, streams(one, two)) == [2] * 4


def test_a_gauge_says_when_the_batch_was_there():
    readings = [(-3.0, 1), (0.2, 4), (5.2, 4), (6.0, 1), (20.0, 1), (23.5, 9)]
    sizes = batch_sizes_read(STEPS, readings)
    assert sizes == [4] * 7 + [1] * 17  # what is read after the end is of the next batch


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(2, 30),
)
def test_sizes_are_the_spans_over_each_step(found, n_tokens):
    pairs = [(first, first + length) for first, length in found]
    times = [2.0 * t for t in range(n_tokens)]
    middles = [1.0, *(t - 1.0 for t in times[1:])]
    expected = [sum(first <= m <= last for first, last in pairs) for m in middles]
    assert batch_sizes_seen(times, spans(*pairs)) == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_most_of_the_time_is_more_than_half(sizes):
    size = most_of_the_time(sizes)
    assert 2 * sum(s >= size for s in sizes) > len(sizes)
    assert 2 * sum(s > size for s in sizes) <= len(sizes)
