"""What servers say oddly is understood, and what is no evidence is not taken for it."""

from __future__ import annotations

import json
import time

import pytest

WORDS = [f" w{i}" for i in range(40)]
LOWEST = -3.4028234663852886e38


class EmptyReason:
    def fields(self, t, token, body):
        return {"finish_reason": "", "matched_stop": None}


class EosToken:
    def end(self, body):
        return "eos_token"


class NoReason:
    def end(self, body):
        return None


class EstimatedUsage:
    def usage(self, body, n):
        return {"prompt_tokens": 0, "completion_tokens": max(1, n * 3 // 4)}


class EstimateThatFitsAtFirst:
    """As characters by four do."""

    def usage(self, body, n):
        return {"prompt_tokens": 3, "completion_tokens": n if n < 8 else n - 2}


class NoUsage:
    def usage(self, body, n):
        return {"prompt_tokens": None, "completion_tokens": 0}


class PlainText:
    content_type = "text/plain; charset=utf-8"


class Lines:
    content_type = "application/x-ndjson"
    done = b""

    def events(self, body):
        for event in super().events(body):
            yield json.dumps(event).encode() + b"\n"


class Parts:
    def fields(self, t, token, body):
        return {"delta": {"content": [{"type": "text", "text": token}]}}


class LowestAlternative:
    def fields(self, t, token, body):
        others = [None, float("-inf"), -9999.0, LOWEST, -3.5]
        top = [{"token": token, "logprob": -0.01234567}, {"token": "x", "logprob": others[t % 5]}]
        entry = {"token": token, "logprob": -0.01234567, "top_logprobs": top}
        return {"logprobs": {"content": [entry]} if body.get("logprobs") else None}


class FewLogprobs:
    """Of the first tokens alone."""

    def fields(self, t, token, body):
        entry = {"token": token, "logprob": -0.5, "top_logprobs": []}
        return {"logprobs": {"content": [entry]} if body.get("logprobs") and t < 2 else None}


class MoreLogprobs(FewLogprobs):
    """Of more tokens than it takes to try it, and not of all."""

    def fields(self, t, token, body):
        return super().fields(t // 5, token, body)


class MoreIds:
    def fields(self, t, token, body):
        return {"token_ids": [t]} if t < 10 and body.get("return_token_ids") else {}


class IdsAtTheEnd:
    def events(self, body):
        for event in super().events(body):
            for choice in event["choices"]:
                if choice.get("finish_reason") and body.get("return_token_ids"):
                    choice["token_ids"] = [*range(self.limit(body))]
            yield event


class OddFacts:
    """Pages and facts of any type."""

    def pages(self):
        page = {"data": 7, "version": [1], "model_path": {}, "default_generation_settings": "x"}
        return dict.fromkeys(("/v1/models", "/props", "/server_info", "/version"), page) | {
            "/metrics": "vllm:num_requests_running 1e999\nllamacpp:requests_processing {} x\n"
        }

    def frame(self):
        number = next(type(self).numbers)
        return {"system_fingerprint": [None, 3, {}, [], True][number % 5], "id": {"a": 1}}


class OwnFingerprints:
    def stream(self, body):
        self.fingerprint = f"fp_{next(type(self).numbers)}"
        return super().stream(body)

    def frame(self):
        return {"system_fingerprint": self.fingerprint}


class OneId:
    """The id says nothing: it is that of every request."""

    def frame(self):
        return {"id": "chatcmpl-0"}


class HoldsConnections:
    """Goes on after the last event."""

    def stream(self, body):
        super().stream(body)
        time.sleep(0.05)


@pytest.mark.parametrize(
    "handler",
    [EmptyReason, EosToken, NoReason, EstimatedUsage, NoUsage, PlainText, Lines, Parts,
     EstimateThatFitsAtFirst, LowestAlternative, FewLogprobs, MoreLogprobs, MoreIds, IdsAtTheEnd,
     OddFacts, OwnFingerprints, OneId, HoldsConnections],
)  # fmt: skip
def test_a_server_that_answers_well_passes(odd, measure, handler):
    judgement, summary, samples = measure(odd(handler))
    assert judgement.verdict.outcome == "PASS", judgement.verdict.reasons
    assert {sample.text for sample in samples if sample.role != "control"} == {"".join(WORDS[:12])}
    assert {sample.error for sample in samples} == {None}
    assert summary.probes[0].serving.n_connections == 11


class Forks:
    """Forks where it has company, at the seventh token."""

    def text(self, t, token):
        return " other" if t == 6 and self.running > 1 else token


@pytest.mark.parametrize("base", [EmptyReason, NoReason, EstimatedUsage, PlainText, Parts])
def test_the_same_server_with_a_fork_fails(odd, measure, base):
    class Handler(Forks, base):
        def fields(self, t, token, body):
            return super().fields(t, self.text(t, token), body)

    judgement, *_ = measure(odd(Handler))
    assert judgement.verdict.outcome == "FAIL"


class WithoutNames:
    """U+FFFD for every byte; the text tells two characters apart."""

    def text(self, t, token):
        if 3 <= t < 6:
            return ""
        return ("\U0001f60a" if self.running < 2 else "\U0001f62d") if t == 6 else token

    def fields(self, t, token, body):
        name = "\ufffd" if 3 <= t <= 6 else token
        top = [{"token": name, "logprob": -0.0260832}, {"token": "x", "logprob": -3.5}]
        entry = {"token": name, "logprob": -0.0260832, "top_logprobs": top}
        return {"logprobs": {"content": [entry]} if body.get("logprobs") else None}


def test_text_is_compared_besides_the_names_of_tokens(odd, measure):
    judgement, summary, samples = measure(odd(WithoutNames))
    assert judgement.verdict.outcome == "FAIL"
    (probe,) = summary.probes
    assert probe.serving.names_differ == 0
    assert probe.serving.texts_differ > 0
    assert len({sample.witness.names_digest for sample in samples}) == 1


class BytesAlone(WithoutNames):
    """The completion ends within a character: only bytes tell its tokens apart."""

    def text(self, t, token):
        return token if t < 11 else ""

    def fields(self, t, token, body):
        name = token if t < 11 else "\ufffd"
        content = token.encode() if t < 11 else b"\xf0" if self.running < 2 else b"\xf1"
        entry = {"token": name, "logprob": -0.0260832, "bytes": list(content), "top_logprobs": []}
        return {"logprobs": {"content": [entry]} if body.get("logprobs") else None}


def test_bytes_are_compared_where_a_name_has_none_of_its_own(odd, measure):
    judgement, *_ = measure(odd(BytesAlone))
    assert judgement.verdict.outcome == "FAIL"


class StripsWholes:
    """As vLLM's chat does: a completion in one piece has no space at its ends."""

    gauge = True

    def stream(self, body):
        if body["stream"]:
            return super().stream(body)
        words = "".join(token for token in self.tokens(body) if self.pause() is None)
        choice = {"message": {"content": words.strip()}, "finish_reason": "length"}
        usage = self.usage(body, self.limit(body))
        return self.send(200, json.dumps({"choices": [choice], "usage": usage}).encode())


def test_a_completion_in_one_piece_is_held_to_no_other_kind(odd, measure):
    _, summary, samples = measure(odd(StripsWholes), batch_sizes=(1, 10), n_samples=40)
    assert max(len(sample.load.slots) for sample in samples) == 10
    assert summary.probes[0].n_unique == 1


class HiddenText:
    """Equal token ids, another text."""

    def fields(self, t, token, body):
        return {"token_ids": [t]} if body.get("return_token_ids") else {}

    def text(self, t, token):
        return " other" if t == 6 and self.running > 1 else token


def test_text_is_compared_besides_token_ids(odd, measure):
    judgement, *_ = measure(odd(HiddenText), chat=False)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("equal token ids and another text" in r for r in judgement.verdict.reasons)


class EndsOtherwise:
    """Equal text, but in a batch its last token is another one: that ends it, and is not sent."""

    def end(self, body):
        return "stop" if self.running > 1 else "length"


class CountsOtherwise:
    """Equal text of other tokens: in a batch there are more of them."""

    def tokens(self, body):
        return WORDS[: self.limit(body) - 3]

    def end(self, body):
        return "stop"

    def usage(self, body, n):
        return {"prompt_tokens": 3, "completion_tokens": n + (self.running > 1)}


@pytest.mark.parametrize("base", [EndsOtherwise, CountsOtherwise])
def test_an_end_or_a_count_that_differs_is_seen_behind_equal_text(odd, measure, base):
    judgement, summary, _ = measure(odd(base))
    assert summary.probes[0].n_unique == 1
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("ended otherwise" in r for r in judgement.verdict.reasons)


class CutByAGateway:
    """The server behind it breaks off in a batch; the gateway ends the stream in form."""

    def events(self, body):
        for t, event in enumerate(super().events(body)):
            if t == 5 and self.running > 1:
                return
            yield event


def test_what_was_cut_off_is_an_error_and_no_divergence(odd, measure):
    judgement, summary, samples = measure(odd(CutByAGateway))
    assert judgement.verdict.outcome == "INCONCLUSIVE", judgement
    assert summary.probes[0].diverged_trials == 0
    errors = [sample.error for sample in samples if sample.error]
    assert errors
    assert all("without a finish_reason" in error for error in errors)
