"""What a server refuses is one clear line; one that asks to wait is obeyed."""

from __future__ import annotations

import email.utils
import time

import pytest

from ndcheck.errors import BackendError, UsageError

WORDS = [f" w{i}" for i in range(40)]


class HiddenReasoning:
    def events(self, body):
        n = self.limit(body)
        yield {"choices": [{"delta": {"content": ""}, "finish_reason": "length"}]}
        details = {"reasoning_tokens": n}
        yield {
            "choices": [],
            "usage": {"completion_tokens": n, "completion_tokens_details": details},
        }


class SendsAllAgain:
    """Every event holds the text so far."""

    def text(self, t, token):
        return "".join(WORDS[: t + 1])


class Cuts:
    """Has a limit of its own."""

    def fields(self, t, token, body):
        return {"token_ids": [t]}

    def tokens(self, body):
        return WORDS[: min(10, self.limit(body))]


class Gateway:
    """Answers anything with the same page."""

    def pages(self):
        class Any(dict):
            def get(self, path):
                return {
                    "status": "ok",
                    "data": [{"id": "other"}],
                    "default_generation_settings": {},
                }

        return Any()

    def refuse(self, path, body):
        if self.limit(body) > 4:
            return 400, {"error": {"message": "temperature 0 is not for you"}}, {}
        return None


class Moved:
    """Has another address, signed for this one client."""

    def refuse(self, path, body):
        return 307, {}, {"location": f"https://user:pw@other.example{path}?sig=S3CRET"}


class NoTemperature:
    def refuse(self, path, body):
        if "max_tokens" in body:
            return 400, {"error": {"message": "send max_completion_tokens"}}, {}
        if body["temperature"] != 1:
            return 400, {"error": {"message": "temperature must be 1"}}, {}
        return None


class ChatAlone:
    def refuse(self, path, body):
        if "chat" not in path:
            return 404, {"detail": "Not Found"}, {}
        return None


class NoChat:
    def refuse(self, path, body):
        return None if path == "/v1/completions" else (404, {"detail": "Not Found"}, {})

    def limit(self, body):
        return body.get("max_tokens", 16)


class Validates:
    """Says beside its words which field they are about, as FastAPI does."""

    def refuse(self, path, body):
        words = "Input should be greater than 0"
        if body["temperature"] == 0:
            return 422, {"detail": [{"loc": ["body", "temperature"], "msg": words}]}, {}
        return None


class Names(Validates):
    """The same as OpenAI does."""

    def refuse(self, path, body):
        error = {"message": "Invalid value", "param": "temperature", "code": None}
        return (400, {"error": error}, {}) if body["temperature"] == 0 else None


class NoProvider:
    """As OpenRouter says that nobody serves the model as it is asked for."""

    words = "No endpoints found that support the requested parameters"

    def refuse(self, path, body):
        return 404, {"error": {"message": self.words, "code": 404}}, {}


class NoSuchModel(NoProvider):
    """And has no list of models."""

    words = "The model `m` does not exist"

    def pages(self):
        return {}


@pytest.mark.parametrize(
    ("handler", "chat", "kind", "words", "other"),
    [
        (HiddenReasoning, True, UsageError, "raise --max-tokens", "it offers"),
        (SendsAllAgain, True, BackendError, "holds all of the text so far", "it offers"),
        (SendsAllAgain, False, BackendError, "holds all of the text so far", "it offers"),
        (Cuts, True, BackendError, "10 of 12 tokens", "it offers"),
        (
            NoTemperature,
            True,
            UsageError,
            "temperature must be 1 (--no-temperature leaves",
            "it offers",
        ),
        (
            Moved,
            True,
            UsageError,
            "redirects to 'https://other.example/v1/chat/completions', which is not",
            "S3CRET",
        ),
        (ChatAlone, False, UsageError, "a server with chat alone needs --chat", "/v1)"),
        (NoChat, True, UsageError, "takes prompts as they are: leave out --chat", "/v1)"),
        (Validates, True, UsageError, "temperature: Input should be greater than 0 (--no-", "/v1)"),
        (Names, True, UsageError, "temperature: Invalid value (--no-temperature", "/v1)"),
        (NoProvider, True, UsageError, "No endpoints found that support", "leave out --chat"),
        (NoSuchModel, True, UsageError, "The model `m` does not exist", "under /v1"),
        (Gateway, True, UsageError, "temperature 0 is not for you", "llama.cpp"),
    ],
)
def test_what_a_server_refuses_is_one_line_with_what_may_help(
    odd, measure, handler, chat, kind, words, other
):
    with pytest.raises(kind) as refused:
        measure(odd(handler), chat=chat)
    assert words in str(refused.value)
    assert other not in str(refused.value)
    assert "\n" not in str(refused.value)


class Busy:
    """Has no time for the first request, and says until when."""

    after = "1"

    def refuse(self, path, body):
        if next(type(self).numbers) == 0:
            return self.status, {"error": {"message": "too many requests"}}, self.header()
        return None

    status = 429

    def header(self):
        return {"retry_after": self.after}


class BusyUntil(Busy):
    status = 503

    def header(self):
        return {"retry_after": email.utils.formatdate(time.time() + 2, usegmt=True)}


@pytest.mark.parametrize("handler", [Busy, BusyUntil])
def test_a_server_that_asks_to_wait_is_obeyed(odd, measure, handler, monkeypatch):
    pauses = []

    async def wait(self, pause_s, outcome):
        pauses.append(pause_s)

    monkeypatch.setattr("ndcheck.samplers.endpoint.client.Client._wait", wait)
    judgement, *_ = measure(odd(handler))
    assert judgement.verdict.outcome == "PASS"
    (pause_s,) = pauses
    assert 0 < pause_s <= 2


def test_waiting_is_said(odd, monkeypatch):
    from dataclasses import replace

    from ndcheck.records import Endpoint
    from ndcheck.request import DEFAULTS
    from ndcheck.samplers.base import open_sampler

    class Later(Busy):
        after = "2"

    said = []
    spec = replace(DEFAULTS, model="m", arms=("stock",), endpoint=Endpoint(odd(Later)))
    open_sampler(spec, say=said.append).close()
    assert said == ["waiting 2 s before retry 1 of 2: HTTP 429: too many requests"]


def test_a_wait_longer_than_the_timeout_is_refused(odd, measure):
    class Tomorrow(Busy):
        after = "86400"

    with pytest.raises(BackendError, match=r"asks to wait 86400 s, longer than --timeout 300"):
        measure(odd(Tomorrow))
