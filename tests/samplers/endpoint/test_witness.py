"""The batch that ran: gauges of several engines, and streams that overlap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.samplers.endpoint.answer import Answer
from ndcheck.samplers.endpoint.witness import overlap, read_gauge

PAGE = b"""# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a b"} 3.0
vllm:num_requests_running{engine="1",model_name="a b"} 5.0
vllm:num_requests_running_total 99
llamacpp:requests_processing 7
broken:gauge NaN
"""


@pytest.mark.parametrize(
    ("gauge", "value"),
    [
        ("vllm:num_requests_running", 5),  # engines do not share batches
        ("llamacpp:requests_processing", 7),
        ("sglang:num_running_reqs", None),
        ("broken:gauge", None),
    ],
)
def test_a_gauge_is_read_for_the_largest_engine(gauge, value):
    assert read_gauge(PAGE, gauge) == value


def spans(*pairs):
    return [Answer(first_s=first, last_s=last) for first, last in pairs]


def test_answers_one_after_the_other_do_not_overlap():
    assert overlap(spans((0, 1), (1, 2), (2, 3))) == 1


def test_answers_in_one_piece_are_no_evidence():
    assert overlap(spans((0, 0), (0, 0))) is None
    assert overlap([Answer()]) is None


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=12))
def test_overlap_is_the_most_spans_over_one_moment(found):
    pairs = [(first, first + length) for first, length in found]
    moments = [first for first, _ in pairs]
    expected = max(sum(first <= t < last for first, last in pairs) for t in moments)
    assert overlap(spans(*pairs)) == expected
