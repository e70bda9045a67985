"""What an answer may not be, and what stands for a completion."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.plan.faults import plant_in_stream
from ndcheck.records import Fault
from ndcheck.samplers.endpoint.answers.answer import Answer, align
from ndcheck.samplers.endpoint.answers.dialects import Completions
from ndcheck.samplers.endpoint.answers.event_stream import RequestFailure
from ndcheck.samplers.endpoint.answers.events import Token
from ndcheck.samplers.endpoint.capabilities import probe
from ndcheck.samplers.endpoint.redaction import Redactor


def named(*names):
    return [Token(name, -1.0, 0.5) for name in names]


def whole(**changed):
    fields = {
        "pieces": ["a", "b"],
        "token_ids": [1, 2],
        "tokens": named("a", "b"),
        "finish_reason": "length",
        "is_end": True,
        "n_tokens": 2,
    }
    return Answer(**{**fields, **changed})


@pytest.mark.parametrize("compared", ["token ids", "logprob tokens", "text"])
def test_a_whole_answer_passes(compared):
    whole().check(2, compared, counts_tokens=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_tokens": 3}, "usage says 3, the stream holds 2"),
        ({"token_ids": [], "n_tokens": None}, "holds no token ids"),
        ({"tokens": named("ab")}, "2 token ids, 1 logprobs"),
        ({"token_ids": [1], "tokens": [], "n_tokens": 1}, "1 of 2 tokens.* give --max-tokens 1"),
        ({"token_ids": [1, 2, 3], "tokens": [], "n_tokens": 3}, "does not obey --max-tokens"),
        ({"token_ids": [], "tokens": [], "pieces": []}, "the completion is empty: its 2 tokens"),
    ],
)
def test_an_answer_that_contradicts_itself_is_a_failure(changed, message):
    with pytest.raises(RequestFailure, match=message):
        whole(**changed).check(2, "token ids", counts_tokens=True)


def test_reasoning_that_is_hidden_is_named():
    answer = Answer(finish_reason="stop", is_end=True, n_reasoning_tokens=7)
    with pytest.raises(RequestFailure, match=r"its 7 tokens are reasoning .* raise --max-tokens"):
        answer.check(9, "text", counts_tokens=True)


@pytest.mark.parametrize(("is_end", "is_whole"), [(True, False), (False, True)])
def test_a_completion_ends_by_its_own_word_or_the_servers(is_end, is_whole):
    Answer(pieces=["a"], is_end=is_end).close(Redactor({}), is_whole=is_whole)
    with pytest.raises(RequestFailure, match="ended before the completion did: no room"):
        Answer(pieces=["a"]).close(Redactor({}), is_whole=False, stray=": no room")


@pytest.mark.parametrize(("n_tokens", "finish"), [(2, "length"), (1, "stop"), (None, "stop")])
def test_an_end_without_a_word_is_known_by_its_length(n_tokens, finish):
    answer = whole(finish_reason=None)
    answer.settle(2, n_tokens)
    assert answer.finish_reason == finish


@pytest.mark.parametrize("pieces", [["one two three four five"], "one two three four five"])
def test_a_text_that_no_tokens_asked_for_make_up_is_a_failure(pieces):
    """However many events bring it: OpenAI's API says nothing of a token in each."""
    answer = Answer(pieces=[*pieces], finish_reason="length", is_end=True)
    answer.check(4, "text", counts_tokens=False)
    with pytest.raises(RequestFailure, match=r"5 words of 2 tokens.* does not obey --max-tokens"):
        answer.check(2, "text", counts_tokens=False)


def test_usage_that_is_an_estimate_is_not_counted_with():
    whole(n_tokens=1, token_ids=[], tokens=[]).check(2, "text", counts_tokens=False)
    with pytest.raises(RequestFailure, match="1 of 2 tokens"):
        whole(n_tokens=1, token_ids=[], tokens=[]).check(2, "text", counts_tokens=True)


def test_the_token_that_ends_a_completion_may_be_counted_without_being_sent():
    whole(finish_reason="stop", n_tokens=3).check(9, "token ids", counts_tokens=True)
    with pytest.raises(RequestFailure, match="usage says 4"):
        whole(finish_reason="stop", n_tokens=4).check(9, "token ids", counts_tokens=True)


TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=5)


@given(st.lists(TEXTS, max_size=20), st.sampled_from(["logprob tokens", "text"]))
def test_ids_stand_for_the_text_and_nothing_is_lost(names, compared):
    answer = Answer(pieces=list(names), tokens=named(*names))
    ids, texts = answer.stream(compared)
    assert len(ids) == len(texts)
    assert "".join(texts) == answer.text
    assert all(0 <= i < 2**31 for i in ids)


@given(st.text(max_size=30), st.text(max_size=30))
def test_texts_have_equal_ids_only_if_they_are_equal(a, b):
    ids_a, _ = Answer(pieces=[a]).stream("text")
    ids_b, _ = Answer(pieces=[b]).stream("text")
    assert (ids_a == ids_b) == (a == b)


NAMES = st.lists(st.sampled_from(["a", "b", " the", "\ufffd", "Ġthe", ""]), min_size=1, max_size=9)


@given(NAMES, st.text("ab the\U0001f60a", max_size=12), st.text("ab the\U0001f60a", max_size=12))
def test_equal_names_with_other_text_are_another_completion(names, a, b):
    """U+FFFD stands for every byte of a character that takes several tokens."""
    ids_a, texts = Answer(pieces=[a], tokens=named(*names)).stream("logprob tokens")
    ids_b, _ = Answer(pieces=list(b), tokens=named(*names)).stream("logprob tokens")
    assert (ids_a == ids_b) == (a == b)
    assert "".join(texts) == a


def test_text_goes_to_its_names_and_the_rest_to_the_last_that_has_none():
    names = [" Sure", "\ufffd", "\ufffd", "\ufffd", " bye"]
    assert align(" Sure\U0001f60a bye", names) == (" Sure", "", "", "\U0001f60a", " bye")


def test_token_texts_come_from_the_tokens_where_they_make_up_the_text():
    assert whole().stream("token ids") == ((1, 2), ("a", "b"))
    assert whole(tokens=named("?", "?")).stream("token ids") == ((1, 2), ("", "ab"))
    assert whole(tokens=[]).stream("token ids") == ((1, 2), ("ab", ""))


def test_what_cannot_be_written_is_shown_as_a_replacement():
    ids, texts = Answer(pieces=["a\ud83d", "\ude0a", "\ud800"]).stream("text")
    assert "".join(texts).encode()
    assert len(ids) == len(texts)


def test_the_planted_fault_changes_what_it_should_and_nothing_before():
    ids, logprobs = plant_in_stream(
        (5, 6, 7, 8), (-0.5, 0.0, -0.25, -1.0), Fault(latent_at=1, fork_at=3)
    )
    assert ids[:3] == (5, 6, 7)
    assert ids[3] != 8
    assert (logprobs[0], logprobs[2]) == (-0.5, -0.25)
    assert logprobs[1] != 0.0


@pytest.mark.parametrize(
    ("changed", "compared"),
    [
        ({}, "token ids"),
        ({"token_ids": []}, "logprob tokens"),
        # As llama.cpp streams where a draft model proposed the second token.
        ({"token_ids": [1], "tokens": named("a")}, "text"),
        ({"token_ids": [], "tokens": named("a")}, "text"),
        ({"token_ids": [1], "tokens": [], "finish_reason": "stop", "n_tokens": 1}, "token ids"),
    ],
)
def test_what_a_server_gives_for_some_tokens_only_stands_for_no_completion(changed, compared):
    answer = whole(**changed)

    async def ask(fields):
        return answer

    found = asyncio.run(probe(Completions(), ask, answer, 2))
    assert found.compared == compared
