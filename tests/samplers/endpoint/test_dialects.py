from __future__ import annotations

from ndcheck.probe import Message
from ndcheck.records import Decoding
from ndcheck.samplers.endpoint.answers.dialects import Chat


def test_a_conversation_is_sent_as_it_is():
    messages = (Message("system", "Be terse."), Message("user", "Hi"))
    body = Chat().body("m", messages, 8, Decoding(8))
    assert body["messages"] == [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "Hi"},
    ]
    assert Chat().body("m", "Hi", 8, Decoding(8))["messages"] == body["messages"][1:]
