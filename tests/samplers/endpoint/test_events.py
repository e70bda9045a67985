"""Events of every shape: read, or refused as a failure of the request."""

from __future__ import annotations

import json
import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.records import Decoding
from ndcheck.samplers.endpoint.answers.answer import Answer
from ndcheck.samplers.endpoint.answers.dialects import Chat, Completions, Generate
from ndcheck.samplers.endpoint.answers.event_stream import EventReader, RequestFailure
from ndcheck.samplers.endpoint.redaction import Redactor

NO_SECRETS = Redactor({})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["choices", "logprobs", "content", "tokens", "token_ids", "usage", "text",
                         "token_logprobs", "top_logprobs", "delta", "meta_info", "output_ids",
                         "finish_reason", "index", "error", "id", "system_fingerprint"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


def read(dialect, *events):
    answer = Answer()
    for number, event in enumerate(events):
        answer.add(dialect.read(event), float(number))
    return answer


def choice(**fields):
    return {"choices": [fields]}


def test_vllm_completions_with_ids_and_logprobs():
    answer = read(
        Completions(),
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
    assert answer.logprobs == (-0.5, -1.5)
    assert answer.margins == (1.5, 0.5)
    assert (answer.n_prompt_tokens, answer.n_tokens) == (3, 2)
    answer.check(2, "token ids", counts_tokens=True)


def test_vllm_gives_the_prompt_s_ids_once_in_a_choice_or_beside_a_chat_s():
    rest = choice(text="b", token_ids=[8], finish_reason="stop")
    first = choice(text="a", token_ids=[7], prompt_token_ids=[1, 2])
    beside = choice(text="a", token_ids=[7]) | {"prompt_token_ids": [1, 2]}
    for event in (first, beside):
        answer = read(Completions(), event, rest)
        assert (answer.prompt_token_ids, answer.token_ids) == ([1, 2], [7, 8])
    assert read(Completions(), rest).prompt_token_ids == []
    with pytest.raises(RequestFailure, match="is no token id"):
        read(Completions(), choice(text="a", prompt_token_ids=["1"]))


def test_llama_cpp_gives_ids_with_its_logprobs():
    entry = {"id": 4, "token": "x", "logprob": -1.0, "top_logprobs": [{"logprob": -1.0}]}
    event = choice(text="x", logprobs={"content": [entry]}) | {"timings": {"cache_n": 3}}
    answer = read(Completions(), event)
    assert (answer.token_ids, answer.names, answer.n_cached_tokens) == ([4], ["x"], 3)


def test_a_drafted_token_of_llama_cpp_s_has_an_id_and_no_logprob():
    known = {"id": 4, "token": "x", "logprob": -1.0, "top_logprobs": [{"logprob": -1.0}]}
    drafted = {"id": 5, "token": "y", "logprob": 0.0, "top_logprobs": []}
    certain = {"id": 6, "token": "z", "logprob": 0.0, "top_logprobs": [{"logprob": 0.0}]}
    answer = read(Completions(), choice(text="xy", logprobs={"content": [known, drafted]}))
    assert (answer.token_ids, answer.logprobs) == ([4, 5], ())
    answer = read(Completions(), choice(text="xz", logprobs={"content": [known, certain]}))
    assert (answer.token_ids, answer.logprobs) == ([4, 6], (-1.0, 0.0))


def test_chat_counts_reasoning_as_part_of_the_completion():
    answer = read(
        Chat(),
        choice(delta={"role": "assistant", "content": None}),
        choice(delta={"reasoning_content": "think "}),
        choice(delta={"content": "say"}),
    )
    assert answer.text == "think say"


def test_a_whole_message_beside_what_is_new_is_not_added():
    whole = {"role": "assistant", "content": "think say"}
    answer = read(
        Chat(),
        choice(delta={"content": "think "}, message={**whole, "content": "think "}),
        choice(delta={"content": "say"}, message=whole),
        choice(delta={}, message=whole, finish_reason="stop"),
    )
    assert answer.text == "think say"


@pytest.mark.parametrize(
    "content",
    ["think say", [{"type": "text", "text": "think say"}],
     [{"type": "thinking", "thinking": [{"type": "text", "text": "think "}]}, {"text": "say"}]],
)  # fmt: skip
def test_content_may_come_in_parts(content):
    assert read(Chat(), choice(message={"content": content})).text == "think say"


def test_calls_of_tools_are_text_and_their_ids_are_not():
    call = {"id": "call_1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    answers = [
        read(Chat(), choice(delta={"tool_calls": [{**call, "id": name}]})) for name in ("a", "b")
    ]
    assert answers[0].text == answers[1].text == 'add{"a": 1}'


META = {
    "finish_reason": {"type": "length"},
    "prompt_tokens": 2,
    "completion_tokens": 2,
    "cached_tokens": 1,
    "output_token_logprobs": [[-0.5, 5, None], [-1.0, 6, None]],
    "output_top_logprobs": [[[-0.5, 5, None], [-0.75, 9, None]], None],
}


def test_sglang_generate():
    answer = read(Generate(), {"text": "ab", "output_ids": [5, 6], "meta_info": META})
    assert answer.token_ids == [5, 6]
    assert answer.logprobs == (-0.5, -1.0)
    assert answer.margins[0] == 0.25
    answer.check(2, "token ids", counts_tokens=True)


def test_sglang_streams_what_there_is_so_far_or_what_is_new():
    first = {
        **META, "finish_reason": None, "completion_tokens": 1,
        "output_token_logprobs": [[-0.5, 5, None]],
    }  # fmt: skip
    second = {**META, "output_token_logprobs": [[-1.0, 5, None]]}
    so_far = read(
        Generate(),
        {"text": "a", "output_ids": [5], "meta_info": first},
        {"text": "ab", "output_ids": [5, 5], "meta_info": META},
    )
    new = read(
        Generate(),
        {"text": "a", "output_ids": [5], "meta_info": first},
        {"text": "b", "output_ids": [5], "meta_info": second},
    )
    for answer in (so_far, new):
        assert (answer.text, answer.token_ids, answer.logprobs) == ("ab", [5, 5], (-0.5, -1.0))


@pytest.mark.parametrize("token_id", [-1, 2**31, 1.5, True, "7", None])
def test_a_token_id_is_a_small_number(token_id):
    with pytest.raises(RequestFailure, match="is no token id"):
        read(Completions(), choice(token_ids=[token_id]))


@pytest.mark.parametrize(
    ("reason", "finish"),
    [("stop", "stop"), ("eos", "stop"), ("eos_token", "stop"), ("end", "stop"),
     ("end_turn", "stop"), ("STOP", "stop"), ("tool_calls", "stop"), ("stop_sequence", "stop"),
     ("length", "length"), ("max_tokens", "length"), ("MAX_TOKENS", "length"),
     ({"type": "length", "length": 3}, "length"), ("whatever", "stop"), (1, None), (True, None)],
)  # fmt: skip
def test_an_end_has_many_words(reason, finish):
    answer = read(Completions(), choice(text="a", finish_reason=reason))
    assert answer.is_end
    assert answer.finish_reason == finish


@pytest.mark.parametrize("reason", ["", None, False, [], {}])
def test_no_word_is_no_end(reason):
    assert not read(Completions(), choice(text="a", finish_reason=reason)).is_end


@pytest.mark.parametrize("reason", ["content_filter", "error", "abort", "cancelled", "SAFETY"])
def test_what_was_broken_off_is_a_failure(reason):
    with pytest.raises(RequestFailure, match=f"finish_reason '{reason.lower()}'"):
        read(Completions(), choice(finish_reason=reason))


LOWEST = -3.4028234663852886e38


@pytest.mark.parametrize("other", [None, float("-inf"), LOWEST, float("nan"), "x", [], True])
def test_an_alternative_of_no_probability_is_none(other):
    entry = {"token": "a", "logprob": -0.5, "top_logprobs": [{"logprob": -0.5}, {"logprob": other}]}
    answer = read(Chat(), choice(delta={"content": "a"}, logprobs={"content": [entry]}))
    assert (answer.logprobs, answer.margins) == ((-0.5,), (math.inf,))


@pytest.mark.parametrize("value", [None, "-1", float("nan"), float("-inf"), 1e300, [], True])
def test_an_answer_with_an_unusable_logprob_has_no_bits(value):
    entries = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": value}]
    answer = read(Chat(), choice(delta={"content": "ab"}, logprobs={"content": entries}))
    assert (answer.logprobs, answer.margins) == ((), ())
    assert answer.names == ["a", "b"]


@given(st.sampled_from([Completions(), Chat(), Generate()]), JSON)
def test_whatever_a_server_sends_is_read_or_refused(dialect, content):
    event = content if isinstance(content, dict) else {"choices": content}
    with suppress(RequestFailure):
        answer = read(dialect, event)
        assert all(0 <= token_id < 2**31 for token_id in answer.token_ids)
        assert all(map(math.isfinite, answer.logprobs))
        for compared in ("token ids", "logprob tokens", "text"):
            ids, texts = answer.stream(compared)
            assert len(ids) == len(texts)
            "".join(texts).encode()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_request_says_what_is_asked(streamed):
    body = Completions().body("m", "p", 5, Decoding(5, 0.0), streamed=streamed)
    assert body == {
        "model": "m", "prompt": "p", "max_tokens": 5, "temperature": 0.0, "stream": streamed,
    }  # fmt: skip
    json.dumps(body)


def take(content, chunk=1 << 20):
    reader = EventReader(NO_SECRETS, "text/html")
    events = []
    for at in range(0, len(content), chunk):
        events += reader.feed(content[at : at + chunk])
    return [*events, *reader.finish()], reader.is_whole


FRAMES = [
    b'data: {"a": 1}\n\ndata: {"b": 2}\n\ndata: [DONE]\n\n',
    b'data: {"a": 1}\ndata: {"b": 2}\ndata: [DONE]\n',
    b'data:{"a": 1}\r\n\r\ndata:{"b": 2}\r\n\r\ndata:[DONE]',
    b'data: {"a": 1}\r\rdata: {"b": 2}\r\rdata: [done]\r\r',
    b'data: {"a":\r\ndata: 1}\r\n\r\ndata: {"b":\r\ndata: 2}\r\n\r\ndata: [DONE]\r\n\r\n',
    b'\xef\xbb\xbf: hello\n\nevent: x\nid: 7\ndata: {"a":\ndata: 1}\n\n: ping\n\ndata: {"b": 2}'
    b'\n\ndata: "[DONE]"\n\ndata: {"c": 3}\n\n',
]


@pytest.mark.parametrize("content", FRAMES)
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_events_are_read_however_they_are_framed(content, chunk):
    assert take(content, chunk) == ([{"a": 1}, {"b": 2}], True)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_objects_on_lines_and_one_object_on_many(chunk):
    assert take(b'{"a": 1}\n{"b": 2}\n', chunk) == ([{"a": 1}, {"b": 2}], False)
    assert take(b'\n{\n "a": {\n"b": 2}\n}\n', chunk) == ([{"a": {"b": 2}}], True)


@pytest.mark.parametrize(
    "content",
    [
        b'data: {"error": {"message": "out of blocks", "code": 500}}\n\n',
        b'data: {"error": "out of blocks"}\n\n',
        b'{"object": "error", "message": "out of blocks", "code": 400}',
        b'{"detail": [{"loc": ["body"], "msg": "out of blocks"}]}',
        b'event: error\ndata: {"message": "out of blocks"}\n\n',
        b"event: error\ndata: out of blocks\n\n",
        b'event: error\r\ndata: {"text": "out of blocks"}\r\n\r\n',
        b'data: {"status": "error", "msg": "out of blocks"}\n\n',
        b'error: {"code": 500, "message": "out of blocks"}\n\n',
        b'data: {"a": 1}\n\n{"error": {"error": {"message": "out of blocks"}}}\n',
        b"data: out of blocks\n\n",
        b'data: {"type": "error", "reason": "out of blocks"}\n\n',
        b'{"success": false, "code": 1301, "msg": "out of blocks"}',
        b'{"error_code": 336501, "error_msg": "out of blocks"}',
    ],
)
def test_an_error_in_the_stream_keeps_its_words(content):
    with pytest.raises(RequestFailure, match="out of blocks"):
        take(content)


def test_an_error_of_a_choice_keeps_its_words():
    event = choice(error={"message": "out of blocks"}, finish_reason="error")
    with pytest.raises(RequestFailure, match="out of blocks"):
        Chat().read(event)


@given(st.binary(max_size=60), st.integers(1, 9))
def test_any_bytes_are_read_or_refused(content, chunk):
    with suppress(RequestFailure):
        take(content, chunk)
