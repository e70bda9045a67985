"""Servers and gateways that answer as products do are measured, and a fork behind them is seen."""

from __future__ import annotations

import json
import zlib

import pytest

from ndcheck.errors import NdcheckError

WORDS = [f" w{i}" for i in range(40)]


class Forks:
    """Where it ``forks``, it does so where it has company, at the seventh token."""

    forks = True

    def text(self, t, token):
        return " other" if t == 6 and self.running > 1 and self.forks else token


class Azure(Forks):
    """Its first event has no choices, and filters speak between tokens."""

    def events(self, body):
        yield {"choices": [], "prompt_filter_results": [{"prompt_index": 0}], "id": "", "model": ""}
        for event in super().events(body):
            yield event
            results = {"content_filter_results": {"hate": {"severity": "safe"}}}
            yield {"choices": [{"index": 0, "finish_reason": None, **results}]}


class Together(Forks):
    """A chat's choices have a text too, and log-probabilities in the older form."""

    def fields(self, t, token, body):
        token = self.text(t, token)
        named = {"tokens": [token], "token_logprobs": [-0.12345678], "token_ids": [t]}
        delta = {"token_id": t, "role": "assistant", "content": token, "tool_calls": None}
        return {"text": token, "delta": delta, "logprobs": named if body.get("logprobs") else None}


class KeepsAlive(Forks):
    """Sends empty lines until there is something to say."""

    def events(self, body):
        yield b"\r\n" * 100
        yield from super().events(body)


class IndexAsText(Forks):
    def fields(self, t, token, body):
        return {"index": "0"}


class Tools(Forks):
    """Calls a tool, whose arguments come in pieces."""

    def fields(self, t, token, body):
        call = {"index": 0, "function": {"arguments": self.text(t, token)}}
        if not t:
            call |= {"id": f"call_{next(type(self).numbers)}", "type": "function"}
            call["function"]["name"] = "f"
        return {"delta": {"role": "assistant", "content": None, "tool_calls": [call]}}


class ToTheEnd(Forks):
    """The end of the connection ends the stream."""

    def begin(self, **headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.close_connection = True

    def stream(self, body):
        self.begin(content_type="text/event-stream")
        for event in self.events(body):
            self.wfile.write(b"data: %s\n\n" % json.dumps(event).encode())
        self.wfile.write(self.done)


class Http10(ToTheEnd):
    protocol_version = "HTTP/1.0"


class Gzips(ToTheEnd):
    """Though nobody said that it may."""

    def stream(self, body):
        self.begin(content_type="text/event-stream", content_encoding="gzip")
        gzip = zlib.compressobj(wbits=31)
        for event in self.events(body):
            data = gzip.compress(b"data: %s\n\n" % json.dumps(event).encode())
            self.wfile.write(data + gzip.flush(zlib.Z_SYNC_FLUSH))
        self.wfile.write(gzip.compress(self.done) + gzip.flush())


@pytest.mark.parametrize(
    "product", [Azure, Together, KeepsAlive, IndexAsText, Tools, ToTheEnd, Http10, Gzips]
)
@pytest.mark.parametrize("forks", [False, True])
def test_a_fork_decides_whatever_is_around_it(odd, measure, product, forks):
    judgement, _, samples = measure(odd(type("Product", (product,), {"forks": forks})))
    assert judgement.verdict.outcome == ("FAIL" if forks else "PASS"), judgement.verdict
    assert {sample.error for sample in samples} == {None}


class Whole:
    """Streams nothing, though it is asked to; empty lines keep the connection until it answers."""

    def stream(self, body):
        text = "".join(token for token in self.tokens(body) if self.pause() is None)
        choice = {"index": 0, "message": {"content": text}, "finish_reason": "length"}
        document = {"choices": [choice], "usage": self.usage(body, self.limit(body))}
        return self.send(200, b"\n" * 200 + json.dumps(document, indent=1).encode())


def test_an_answer_after_many_empty_lines_is_read(odd, measure):
    _, summary, samples = measure(odd(Whole))
    assert {sample.text for sample in samples if sample.role != "control"} == {"".join(WORDS[:12])}
    assert summary.probes[0].n_unique == 1


class SaysItElsewhere:
    """Refuses with HTTP 200, in fields of its own."""

    def stream(self, body):
        refusal = {"id": "1", "choices": None, "base_resp": {"status_msg": "insufficient balance"}}
        return self.send(200, json.dumps(refusal).encode())


class OtherIndex(Forks):
    def fields(self, t, token, body):
        return {"index": 1}


@pytest.mark.parametrize(
    ("product", "words"),
    [
        (SaysItElsewhere, "no completion: .*insufficient balance"),
        (OtherIndex, "does not read: choice.text"),
    ],
)
def test_an_answer_without_a_completion_is_quoted(odd, measure, product, words):
    with pytest.raises(NdcheckError, match=words) as refused:
        measure(odd(product))
    assert "\n" not in str(refused.value)
