"""Events of every shape: read, or refused as a failure of the request."""

from __future__ import annotations

import json
import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.records import Decoding
from ndcheck.samplers.endpoint.answer import Answer, RequestFailure
from ndcheck.samplers.endpoint.dialects import Chat, Completions, Generate

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["choices", "logprobs", "content", "tokens", "token_ids", "usage", "text",
                         "token_logprobs", "top_logprobs", "delta", "meta_info", "output_ids",
                         "finish_reason", "index"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


def read(dialect, *events):
    answer = Answer()
    for event in events:
        dialect.read(event, answer)
    return answer


def choice(**fields):
    return {"choices": [fields]}


def test_vllm_completions_with_ids_and_logprobs():
    answer = read(
        Completions(streamed=True),
        choice(
            text="ab",
            token_ids=[7, 8],
            logprobs={
                "tokens": ["a", "b"],
                "token_logprobs": [-0.5, -1.5],
                "top_logprobs": [{"a": -0.5, "x": -2.0}, {"y": -1.0, "b": -1.5}],
            },
        ),
        choice(text="", finish_reason="length"),
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    )
    assert answer.stream("token ids") == ((7, 8), ("a", "b"))
    assert answer.logprobs == [-0.5, -1.5]
    assert answer.margins == [1.5, 0.5]
    assert (answer.n_prompt_tokens, answer.n_tokens) == (3, 2)
    answer.check(2, "token ids")


def test_llama_cpp_gives_ids_with_its_logprobs():
    entry = {"id": 4, "token": "x", "logprob": -1.0, "top_logprobs": [{"logprob": -1.0}]}
    event = choice(text="x", logprobs={"content": [entry]}) | {"timings": {"cache_n": 3}}
    answer = read(Completions(streamed=False), event)
    assert (answer.token_ids, answer.tokens, answer.n_cached_tokens) == ([4], ["x"], 3)


def test_chat_counts_reasoning_as_part_of_the_completion():
    answer = read(
        Chat(streamed=True),
        choice(delta={"role": "assistant", "content": None}),
        choice(delta={"reasoning_content": "think "}),
        choice(delta={"content": "say"}),
    )
    assert answer.text == "think say"


def test_sglang_generate():
    meta = {
        "finish_reason": {"type": "length"},
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "cached_tokens": 1,
        "output_token_logprobs": [[-0.5, 5, None], [-1.0, 6, None]],
        "output_top_logprobs": [[[-0.5, 5, None], [-0.75, 9, None]], None],
    }
    answer = read(Generate(), {"text": "ab", "output_ids": [5, 6], "meta_info": meta})
    assert answer.token_ids == [5, 6]
    assert answer.logprobs == [-0.5, -1.0]
    assert answer.margins[0] == 0.25
    answer.check(2, "token ids")


@pytest.mark.parametrize("token_id", [-1, 2**31, 1.5, True, "7", None])
def test_a_token_id_is_a_small_number(token_id):
    with pytest.raises(RequestFailure, match="is no token id"):
        read(Completions(streamed=True), choice(token_ids=[token_id]))


@given(st.sampled_from([Completions(streamed=True), Chat(streamed=False), Generate()]), JSON)
def test_whatever_a_server_sends_is_read_or_refused(dialect, content):
    event = content if isinstance(content, dict) else {"choices": content}
    with suppress(RequestFailure):
        answer = read(dialect, event)
        assert all(0 <= token_id < 2**31 for token_id in answer.token_ids)
        assert all(map(math.isfinite, answer.logprobs))
        assert isinstance(answer.text, str)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_request_says_what_is_asked(streamed):
    body = Completions(streamed=streamed).body("m", "p", 5, Decoding(5, 0.0))
    assert body == {
        "model": "m", "prompt": "p", "max_tokens": 5, "temperature": 0.0, "stream": streamed,
    }  # fmt: skip
    json.dumps(body)
