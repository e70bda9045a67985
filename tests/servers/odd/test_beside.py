"""What a server generates beside the text, or in other shapes, is compared or named."""

from __future__ import annotations

import uuid

import pytest

from ndcheck.errors import UsageError
from ndcheck.records import Decoding

WORDS = [f" w{i}" for i in range(40)]


class Planted:
    """In a batch the token at ``at`` is another one."""

    at, forks, step_s = 6, True, 0.004

    def planted(self, t, token):
        return " other" if self.forks and t == self.at and self.running > 1 else token


def calls(function):
    return {"tool_calls": [{"index": 0, "id": uuid.uuid4().hex, **function}]}


class CallsWithObjects(Planted):
    given = staticmethod(lambda word: {"word": word})

    def fields(self, t, token, body):
        return {"delta": calls({"function": {"arguments": self.given(self.planted(t, token))}})}


class CallsWithLists(CallsWithObjects):
    given = staticmethod(lambda word: [word, 7, None])


class CustomCalls(Planted):
    def fields(self, t, token, body):
        return {"delta": calls({"custom": {"name": "f", "input": self.planted(t, token)}})}


class ReasoningDetails(Planted):
    at = 3

    def fields(self, t, token, body):
        detail = {"type": "reasoning.text", "text": self.planted(t, token), "signature": None}
        return {"delta": {"content": "", "reasoning_details": [detail]}} if t < 6 else {}


class ThinkingBlocks(Planted):
    at = 3

    def fields(self, t, token, body):
        block = {"type": "thinking", "thinking": self.planted(t, token), "signature": str(t)}
        return {"delta": {"content": "", "thinking_blocks": [block]}} if t < 6 else {}


class PartsWithValues(Planted):
    def fields(self, t, token, body):
        part = {"type": "output_text", "value": self.planted(t, token)}
        return {"delta": {"content": [part, {"type": "text", "text": "."}]}}


class ResponsesCall(Planted):
    """Offers the Responses API alone, and calls a function there."""

    done = b""

    def limit(self, body):
        return body["max_output_tokens"]

    def refuse(self, path, body):
        is_here = path == "/v1/responses"
        return None if is_here else (404, {"error": {"message": "Unknown request URL"}}, {})

    def events(self, body):
        for t, token in enumerate(WORDS[: self.limit(body)]):
            self.pause()
            if t == 6:
                name = {"type": "function_call", "name": self.planted(t, "f"), "arguments": ""}
                yield {"type": "response.output_item.added", "item": name}
            yield {"type": "response.custom_tool_call_input.delta", "delta": token}
        usage = {"input_tokens": 3, "output_tokens": self.limit(body)}
        ended = {"id": uuid.uuid4().hex, "status": "completed", "usage": usage}
        yield {"type": "response.completed", "response": ended}


READ = [CallsWithObjects, CallsWithLists, CustomCalls, ReasoningDetails, ThinkingBlocks,
        PartsWithValues, ResponsesCall]  # fmt: skip


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("base", READ)
def test_calls_and_reasoning_of_any_shape_are_compared(odd, measure, base, forks):
    handler = type("Handler", (base,), {"forks": forks})
    judgement, *_ = measure(odd(handler), decoding=Decoding(16))
    assert judgement.verdict.outcome == ("FAIL" if forks else "PASS"), judgement.verdict.reasons


class Stops(Planted):
    def tokens(self, body):
        return WORDS[: max(1, self.limit(body) - 3)]

    def end(self, body):
        return "stop"


class Speaks(Planted):
    def fields(self, t, token, body):
        audio = {"id": uuid.uuid4().hex, "transcript": self.planted(t, token)}
        return {"delta": {"content": token, "audio": audio, "obfuscation": uuid.uuid4().hex}}


class StopsAtAnother(Stops):
    """Equal text and counts: the token that ends it, which is not sent, is another one."""

    def events(self, body):
        for event in super().events(body):
            for choice in event["choices"]:
                if choice.get("finish_reason"):
                    choice["stop_reason"] = 128001 if self.planted(6, "") else 128009
            yield event


class CallsInstead(Stops):
    def end(self, body):
        return "tool_calls" if self.planted(6, "") else "stop"


class ThinksLonger(Stops):
    """It shows none of that, and counts it apart."""

    def usage(self, body, n):
        hidden = {"reasoning_tokens": 7 if self.planted(6, "") else 5}
        return {"prompt_tokens": 3, "completion_tokens": n, "completion_tokens_details": hidden}


class ThinksOn(Planted):
    """Equal text, of which a token more is reasoning; what ends it is in no text."""

    def fields(self, t, token, body):
        is_thought = t < (7 if self.planted(6, "") else 6)
        return {"delta": {"reasoning_content" if is_thought else "content": token}}


class ThinksOnInResponses(ResponsesCall):
    """The same, of the Responses API."""

    def events(self, body):
        *_, ended = super().events({**body, "max_output_tokens": 0})
        for t, token in enumerate(WORDS[: self.limit(body)]):
            self.pause()
            is_thought = t < (7 if self.planted(6, "") else 6)
            kind = "reasoning_text" if is_thought else "output_text"
            yield {"type": f"response.{kind}.delta", "delta": token}
        ended["response"]["usage"]["output_tokens"] = self.limit(body)
        yield ended


class TwoChoices(Planted):
    def events(self, body):
        for event in super().events(body):
            yield event
            for choice in event["choices"]:
                if choice["delta"]:
                    other = {"content": self.planted(6, "x")}
                    yield {"choices": [{**choice, "index": 1, "delta": other}]}


FIELDS = {
    Speaks: "audio.transcript",
    StopsAtAnother: "stop_reason",
    CallsInstead: "finish_reason",
    ThinksLonger: "reasoning_tokens",
    TwoChoices: "choice.text",
    ThinksOn: "reasoning",
    ThinksOnInResponses: "reasoning",
}


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("base", FIELDS)
def test_what_differs_beside_equal_text_lets_nothing_pass(odd, measure, base, forks):
    handler = type("Handler", (base,), {"forks": forks})
    judgement, summary, _ = measure(odd(handler), decoding=Decoding(16))
    (probe,) = summary.probes
    assert probe.serving.other_fields == ((FIELDS[base],) if forks else ())
    assert judgement.verdict.outcome == ("INCONCLUSIVE" if forks else "PASS")
    assert any(FIELDS[base] in reason for reason in judgement.verdict.reasons) == forks


class Draws:
    def fields(self, t, token, body):
        return {"delta": {"executable_code": {"language": "python", "code": token}}}


def test_text_in_an_unknown_field_is_not_called_hidden_reasoning(odd, measure):
    words = r"does not read: executable_code\.code, executable_code\.language$"
    with pytest.raises(UsageError, match=words):
        measure(odd(Draws))
