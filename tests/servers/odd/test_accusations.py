"""What is no cache, and no batch that never formed, is not taken for one."""

from __future__ import annotations

import json
import time

import pytest

from ndcheck.errors import BackendError
from ndcheck.records import Decoding, Probe


class TakesOneAtATime:
    """Refuses what comes within so many seconds of the last request that it took."""

    interval_s = 0.4

    def refuse(self, path, body):
        now_s = time.monotonic()
        if now_s < self.state.get("free_s", 0):
            return 429, {"error": {"message": "slow down"}}, {"Retry_After": "0.5"}
        self.state["free_s"] = now_s + self.interval_s
        return None


def test_the_wait_before_a_retry_is_no_time_of_a_first_token(odd, measure):
    judgement, *_ = measure(
        odd(TakesOneAtATime), axes=("run-to-run",), batch_sizes=(1,), n_samples=3
    )
    assert judgement.verdict.outcome == "PASS", judgement.verdict.reasons


class SaysNothing:
    """To one of two prompts: its completion is empty."""

    def tokens(self, body):
        return [] if "quiet" in json.dumps(body["messages"]) else super().tokens(body)

    def end(self, body):
        return "stop"


def test_an_empty_completion_is_laid_to_no_cache(odd, measure):
    probes = (Probe("p1", "class Queue:"), Probe("p2", "quiet"))
    judgement, *_ = measure(odd(SaysNothing), probes=probes, batch_sizes=(1,), axes=("run-to-run",))
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert not any("cache" in reason for reason in judgement.verdict.reasons)


class FailsWhileBatchesForm:
    gauge = True
    step_s = 0.02

    def pages(self):
        pages = super().pages()
        if self.running in (1, 2):
            del pages["/metrics"]
        return pages


def test_metrics_that_failed_are_asked_again(odd, measure):
    judgement, *_ = measure(
        odd(FailsWhileBatchesForm), decoding=Decoding(24), chat=False, mode="mixed", n_samples=7
    )
    assert judgement.verdict.outcome == "PASS", judgement.verdict.reasons


class HoldsBack:
    """A proxy before it sends all events of an answer together."""

    step_s = 0.02
    wbufsize = -1

    def write(self, content):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))


class HoldsBackWithGauge(HoldsBack):
    gauge = True


def test_streams_that_are_held_back_are_not_said_to_have_run_alone(odd, measure):
    judgement, summary, _ = measure(odd(HoldsBack))
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert "not witnessed" in " ".join(judgement.verdict.reasons)
    assert not summary.probes[0].serving.reached


def test_streams_that_are_held_back_contradict_no_metrics(odd, measure):
    judgement, *_ = measure(odd(HoldsBackWithGauge), decoding=Decoding(40), n_samples=7)
    assert judgement.verdict.outcome == "PASS", judgement.verdict.reasons


class TextAlone:
    def usage(self, body, n):
        return None


class LetterByLetter(TextAlone):
    def events(self, body):
        for event in super().events(body):
            part = event["choices"][0]["delta"]
            for letter in part.get("content", ""):
                yield {"choices": [{"index": 0, "delta": {"content": letter}}]}
        yield event


class IgnoresTheLimit(TextAlone):
    def tokens(self, body):
        return [" w"] * 3 * self.limit(body)


def test_several_events_a_token_are_no_other_length(odd, measure):
    judgement, *_ = measure(odd(LetterByLetter))
    assert judgement.verdict.outcome == "PASS", judgement.verdict.reasons


def test_a_text_of_three_times_the_tokens_is_named(odd, measure):
    with pytest.raises(BackendError, match=r"36 words of 12 tokens: .* not obey --max-tokens"):
        measure(odd(IgnoresTheLimit))


class NoGzip:
    def stream(self, body):
        self.send(200, b'{"choices": []}', content_encoding="gzip")


def test_an_answer_that_is_not_encoded_as_it_says_is_no_broken_connection(odd, measure):
    with pytest.raises(BackendError, match="not encoded as its headers say"):
        measure(odd(NoGzip))
