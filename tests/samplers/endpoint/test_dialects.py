from __future__ import annotations

import pytest

from ndcheck.probe import Message
from ndcheck.records import Decoding
from ndcheck.samplers.endpoint.answers.dialects import Chat
from ndcheck.samplers.endpoint.answers.event_stream import RequestFailure
from ndcheck.samplers.endpoint.answers.responses import Responses


def test_a_conversation_is_sent_as_it_is():
    messages = (Message("system", "Be terse."), Message("user", "Hi"))
    body = Chat().body("m", messages, 8, Decoding(8))
    assert body["messages"] == [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "Hi"},
    ]
    assert Chat().body("m", "Hi", 8, Decoding(8))["messages"] == body["messages"][1:]


def test_a_hint_about_streams_is_taken_and_a_proxy_s_upstream_is_none():
    dialect = Chat()
    assert not dialect.take_hint("HTTP 503: upstream connect error")
    assert dialect.body("m", "Hi", 8, Decoding(8))["stream"]
    assert dialect.take_hint("HTTP 400: Streaming is not supported")
    assert not dialect.body("m", "Hi", 8, Decoding(8))["stream"]


def test_a_response_that_failed_keeps_its_words():
    error = {"code": "server_error", "message": "out of blocks"}
    for response in ({"status": "failed", "error": error}, {"status": "failed", "error": None}):
        words = "finish_reason 'failed'" + (": out of blocks" if response["error"] else "$")
        with pytest.raises(RequestFailure, match=words):
            Responses().read({"type": "response.failed", "response": response})


@pytest.mark.parametrize(
    ("message", "is_taken"),
    [
        ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", True),
        ("max_tokens: Extra inputs are not permitted", True),
        ("Unrecognized request argument supplied: max_tokens", True),
        ("max_tokens must be at most 4096", False),
        ("Unknown field: seed", False),
    ],
)
def test_the_newer_limit_is_sent_where_the_older_is_none(message, is_taken):
    dialect = Chat()
    assert dialect.take_hint(message) == is_taken
    assert ("max_completion_tokens" in dialect.body("m", "Hi", 8, Decoding(8))) == is_taken
    assert not dialect.take_hint(message)
