"""What an answer may not be, and what stands for a completion."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.records import Fault
from ndcheck.samplers.endpoint.answer import Answer, RequestFailure, checked_logprob
from ndcheck.samplers.endpoint.sampler import plant


def whole(**changed):
    fields = {
        "pieces": ["a", "b"],
        "token_ids": [1, 2],
        "tokens": ["a", "b"],
        "logprobs": [-1.0, -2.0],
        "finish_reason": "length",
        "n_tokens": 2,
    }
    return Answer(**{**fields, **changed})


@pytest.mark.parametrize("compared", ["token ids", "logprob tokens", "text"])
def test_a_whole_answer_passes(compared):
    whole().check(2, compared)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"finish_reason": None}, "ended before the completion did"),
        ({"n_tokens": 3}, "usage says 3, the stream holds 2"),
        ({"token_ids": [], "n_tokens": None}, "holds no token ids"),
        ({"logprobs": [-1.0]}, "2 token ids, 1 logprobs"),
        ({"token_ids": [1], "logprobs": [], "n_tokens": 1}, "1 of 2 tokens"),
        ({"token_ids": [1, 2, 3], "logprobs": [], "n_tokens": 3}, "3 of 2 tokens"),
    ],
)
def test_an_answer_that_contradicts_itself_is_a_failure(changed, message):
    with pytest.raises(RequestFailure, match=message):
        whole(**changed).check(2, "token ids")


def test_the_token_that_ends_a_completion_may_be_counted_without_being_sent():
    whole(finish_reason="stop", n_tokens=3).check(9, "token ids")
    with pytest.raises(RequestFailure, match="usage says 4"):
        whole(finish_reason="stop", n_tokens=4).check(9, "token ids")


def test_only_a_natural_end_is_an_end():
    with pytest.raises(RequestFailure, match="finish_reason 'content_filter'"):
        Answer().finish("content_filter")


@pytest.mark.parametrize("value", [None, "-1", float("nan"), float("-inf"), 1e300, [], True])
def test_a_logprob_is_a_finite_number(value):
    if value is True:  # a bool is a number to Python
        assert checked_logprob(value) == 1.0
        return
    with pytest.raises(RequestFailure, match="is not a finite number"):
        checked_logprob(value)


@given(st.lists(st.text(max_size=5), max_size=20), st.sampled_from(["logprob tokens", "text"]))
def test_ids_stand_for_the_text_and_nothing_is_lost(tokens, compared):
    answer = Answer(pieces=list(tokens), tokens=list(tokens))
    ids, texts = answer.stream(compared)
    assert len(ids) == len(texts)
    assert "".join(texts) == answer.text
    assert all(0 <= i < 2**31 for i in ids)


@given(st.text(max_size=30), st.text(max_size=30))
def test_texts_have_equal_ids_only_if_they_are_equal(a, b):
    ids_a, _ = Answer(pieces=[a]).stream("text")
    ids_b, _ = Answer(pieces=[b]).stream("text")
    assert (ids_a == ids_b) == (a == b)


def test_token_texts_come_from_the_tokens_where_they_make_up_the_text():
    assert whole().stream("token ids") == ((1, 2), ("a", "b"))
    assert whole(tokens=["?", "?"]).stream("token ids") == ((1, 2), ("ab", ""))


def test_the_planted_fault_changes_what_it_should_and_nothing_before():
    ids, logprobs = plant((5, 6, 7, 8), (-0.5, 0.0, -0.25, -1.0), Fault(latent_at=1, fork_at=3))
    assert ids[:3] == (5, 6, 7)
    assert ids[3] != 8
    assert (logprobs[0], logprobs[2]) == (-0.5, -0.25)
    assert logprobs[1] != 0.0
