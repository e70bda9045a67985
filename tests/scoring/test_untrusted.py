"""Whatever a file or a server says is a completion, a score, or one line on what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.errors import NdcheckError, UsageError
from ndcheck.scoring.completions import LOGPROB, _of_lines
from ndcheck.scoring.endpoint import _read_sglang, _read_vllm
from ndcheck.scoring.scorers import checked

IDS = (3, 1, 4, 1)
numbers = st.integers() | st.floats() | st.sampled_from([-1.0, 0, 1, 2**31, -1e9])
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
lines = st.fixed_dictionaries(
    {"prompt_ids": st.lists(numbers) | anything, "completion_ids": st.lists(numbers) | anything},
    optional={"logprobs": st.lists(numbers) | anything, "ranks": st.lists(numbers) | anything},
)


@given(lines | anything)
def test_a_line_is_a_completion_or_one_line(document):
    content = json.dumps(document).encode()
    found, refusal = [], "f line 1: "
    try:
        found = list(_of_lines(iter([content]), Path("f")))
    except UsageError as error:
        refusal = str(error)
    assert refusal.startswith("f line 1: ")
    for completion in found:
        assert completion.prompt_ids
        assert completion.token_ids
        assert len(completion.token_ids) == len(completion.logprobs)
        assert all(value in LOGPROB for value in completion.logprobs)


entries = st.dictionaries(
    st.sampled_from([*map(str, IDS), "7"]),
    st.fixed_dictionaries({"logprob": numbers | anything}, optional={"rank": numbers | anything}),
)


@given(st.lists(st.none() | entries | anything, min_size=4, max_size=4) | anything)
def test_vllm_s_answer_is_a_score_or_one_line(given_entries):
    event = {"choices": [{"prompt_logprobs": given_entries}]}
    check_score(lambda: _read_vllm(event, IDS))


triples = st.tuples(numbers | anything, st.sampled_from(IDS), st.none()).map(list)


@given(st.lists(triples | anything, min_size=4, max_size=4) | anything)
def test_sglang_s_answer_is_a_score_or_one_line(given_entries):
    event = {"meta_info": {"input_token_logprobs": given_entries}}
    check_score(lambda: _read_sglang(event, IDS))


def check_score(read):
    try:
        found = read()
        if found is None:
            return
        ranks = [rank for _, rank in found[2:]]
        score = checked([x for x, _ in found[2:]], [] if None in ranks else ranks, IDS[2:], "it")
    except NdcheckError:
        return
    assert score.logprobs.shape == (2,)
    assert np.isfinite(score.logprobs).all()
    assert score.ranks is None or (score.ranks >= 1).all()


def test_what_is_right_is_taken():
    """The control of the tests above: not everything is refused."""
    found = _read_vllm(
        {"choices": [{"prompt_logprobs": [None, *({str(i): {"logprob": -1.5}} for i in IDS[1:])]}]},
        IDS,
    )
    assert found == [(None, None), *[(-1.5, None)] * 3]
    assert (
        _read_sglang({"meta_info": {"input_token_logprobs": [[-0.5, i, None] for i in IDS]}}, IDS)
        == [(-0.5, None)] * 4
    )
    with pytest.raises(NdcheckError, match="other tokens than it was given"):
        _read_sglang({"meta_info": {"input_token_logprobs": [[-0.5, 9, None]] * 4}}, IDS)
