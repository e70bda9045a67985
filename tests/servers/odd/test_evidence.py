"""Caches, replicas and thin batches: what servers make of requests that were sent together."""

from __future__ import annotations

import json
import random
import threading
import time

import pytest

from ndcheck.records import Probe

WORDS = [f" w{i}" for i in range(40)]


class Caches:
    """Repeats whole answers by request; the model behind it is random."""

    ids = True

    def events(self, body):
        key = json.dumps(body, sort_keys=True)
        if key not in self.state:
            words = [{**body, "n": random.choice(WORDS)} for _ in range(self.limit(body))]
            texts = [word["n"] for word in words]
            self.state[key] = (f"cmpl-{len(self.state)}", texts)
        self.name, texts = self.state[key]
        self.texts = texts
        yield from super().events(body)

    def tokens(self, body):
        return self.texts

    def frame(self):
        return {"id": self.name} if self.ids else {}


class CachesWithoutIds(Caches):
    ids = False


class FewIds:
    """As Ollama: each answer's id is one of 999, drawn at random; here, of the first few."""

    names = (12, 700, 3, 45)

    def events(self, body):
        number = self.names[next(type(self).numbers) % 4]
        for event in super().events(body):
            yield {**event, "id": f"chatcmpl-{number}"}


def test_ids_that_are_drawn_from_few_tell_of_no_cache(odd, measure):
    judgement, *_ = measure(odd(FewIds))
    assert judgement.verdict.outcome == "PASS", judgement.verdict.reasons


def test_whole_answers_from_a_cache_are_no_evidence(odd, measure):
    judgement, summary, _ = measure(odd(Caches))
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("the response id of another answer" in r for r in judgement.verdict.reasons)
    assert summary.probes[0].n_unique == 1


def test_a_cache_is_seen_by_requests_that_differ_in_their_limit(odd, measure):
    judgement, *_ = measure(odd(CachesWithoutIds))
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("differ in their limit alone" in r for r in judgement.verdict.reasons)


class Replays:
    """Takes its time for a request that is new, and none for one that it knows."""

    def pause(self):
        time.sleep(self.step_s)

    def events(self, body):
        key = json.dumps(body, sort_keys=True)
        self.step_s = 0 if key in self.state else 0.004
        time.sleep(0 if key in self.state else 0.3)
        self.state[key] = True
        yield from super().events(body)


def test_answers_sooner_than_a_first_token_are_no_evidence(odd, measure):
    judgement, *_ = measure(odd(Replays), batch_sizes=(1,), n_samples=5)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("sooner than a first token can" in r for r in judgement.verdict.reasons)


class NamesItsCache:
    """Its headers say whether an answer was computed."""

    headers_of = {}  # noqa: RUF012

    def send_response(self, *status):
        super().send_response(*status)
        for name, value in self.headers_of.items():
            self.send_header(name, value)


@pytest.mark.parametrize(
    ("headers_of", "is_cached"),
    [
        ({"x-cache": "HIT"}, True),
        ({"X-Cache": "Hit from cloudfront"}, True),
        ({"cf-aig-cache-status": "HIT"}, True),
        ({"x-semantic-cache-hit": "true"}, True),
        ({"cache-status": "ExampleCache; hit; ttl=30"}, True),
        ({"age": "12"}, True),
        ({"x-cache": "TCP_MEM_HIT from a23-4-5-6 (AkamaiGHost)"}, True),
        ({"x-cache": "RefreshHit from cloudfront"}, True),
        ({"x-cache-hits": "0, 1"}, True),
        ({"x-cache-status": "STALE"}, True),
        ({"x-cache": "TCP_MISS", "x-cache-hits": "0, 0", "x-cache-status": "BYPASS"}, False),
        ({"cache-status": "ExampleCache; fwd=stale; fwd-status=200"}, False),
        ({"x-cache": "MISS", "age": "0", "cache-control": "no-cache"}, False),
        ({"cache-status": "ExampleCache; fwd=uri-miss", "x-cache-hit": "false"}, False),
        ({"x-prompt-cache": "hit", "x-cached-prompt-tokens": "12"}, False),
    ],
)
def test_answers_that_name_a_cache_are_no_evidence(odd, measure, headers_of, is_cached):
    handler = type("Handler", (NamesItsCache,), {"headers_of": headers_of, "step_s": 0.01})
    judgement, *_ = measure(odd(handler))
    assert judgement.verdict.outcome == ("INCONCLUSIVE" if is_cached else "PASS")
    assert any("out of a cache, by" in r for r in judgement.verdict.reasons) == is_cached


class Fallback:
    """A gateway that turns to another model, or to another's machines, now and then."""

    names = ("model", "provider")

    def events(self, body):
        self.named = "other" if next(type(self).numbers) % 7 == 6 else "m"
        yield from super().events(body)

    def frame(self):
        return {"model": "m", self.names[-1]: self.named}


class FallbackOfModels(Fallback):
    names = ("model",)


@pytest.mark.parametrize("handler", [Fallback, FallbackOfModels])
def test_a_gateway_that_asks_others_now_and_then_is_seen(odd, measure, handler):
    judgement, *_ = measure(odd(handler), batch_sizes=(1, 2))
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("more than one model or provider" in r for r in judgement.verdict.reasons)


class NextDay:
    """Renders its chat template with another date from the thirtieth answer on."""

    def events(self, body):
        date = [20, 21] if next(type(self).numbers) > 30 else [20, 20]
        for event in super().events(body):
            yield {**event, **({"prompt_token_ids": [5, *date]} if event["choices"] else {})}

    def fields(self, t, token, body):
        return {"token_ids": [t]}


def test_a_prompt_that_changes_in_the_server_is_seen(odd, measure):
    judgement, *_ = measure(odd(NextDay), batch_sizes=(1, 2), n_samples=20)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("prompts that had other tokens" in r for r in judgement.verdict.reasons)


class AlwaysTheSame(Fallback):
    def frame(self):
        return {"model": "m", "provider": "one"}


def test_a_gateway_that_asks_one_passes(odd, measure):
    judgement, *_ = measure(odd(AlwaysTheSame), batch_sizes=(1, 2))
    assert judgement.verdict.outcome == "PASS", judgement.verdict.reasons


class EarlyFillers:
    """Fillers end after six tokens; the fork needs company at the eleventh."""

    gauge = True
    step_s = 0.02

    def tokens(self, body):
        is_filler = "class Queue" not in body["prompt"]
        return WORDS[: 6 if is_filler else self.limit(body)]

    def end(self, body):
        return "stop" if "class Queue" not in body["prompt"] else "length"

    def text(self, t, token):
        return " other" if t == 10 and self.running > 1 else token


class EarlyFillersAlone(EarlyFillers):
    """The same, and no second filler is let in: the probe ends alone."""

    def refuse(self, path, body):
        if "class Queue" in body["prompt"]:
            type(self).n_fillers = 0
        else:
            type(self).n_fillers = getattr(type(self), "n_fillers", 0) + 1
            if self.n_fillers > 2:
                time.sleep(0.6)

    def text(self, t, token):
        return token


MIXED = {
    "chat": False,
    "mode": "mixed",
    "batch_sizes": (1, 3),
    "n_samples": 7,
}


def test_fillers_that_end_early_are_replaced(odd, measure):
    judgement, _, samples = measure(odd(EarlyFillers), **MIXED)
    assert judgement.verdict.outcome == "FAIL"
    for sample in samples:
        assert len(sample.witness.step_batch_sizes) == len(sample.token_ids)
        assert sample.witness.achieved_batch_size == sample.load.batch_size


def test_a_batch_that_was_there_for_a_glimpse_only_is_no_witness(odd, measure):
    judgement, *_ = measure(odd(EarlyFillersAlone), decoding=decoding(24), **MIXED)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    reasons = " ".join(judgement.verdict.reasons)
    assert "thinner than asked for most of the time" in reasons


class Queues:
    """Sends everyone's first token at once, and the rest of one answer after the other."""

    lock = threading.Lock()

    def pause(self):
        pass

    def events(self, body):
        first, *rest = super().events(body)
        yield first
        with self.lock:
            for event in rest:
                time.sleep(self.step_s)
                yield event


@pytest.mark.parametrize("chosen", [{}, {"mode": "mixed"}])
def test_a_first_token_is_no_witness_of_the_batch_after_it(odd, measure, chosen):
    chosen = {"batch_sizes": (1, 4), "decoding": decoding(12), **chosen}
    judgement, *_ = measure(odd(Queues), **chosen)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert "thinner than asked for most of the time" in " ".join(judgement.verdict.reasons)


def decoding(n_tokens):
    from ndcheck.records import Decoding

    return Decoding(n_tokens)


class CountsWhatWaits:
    """One request at a time; its metrics count all that were taken in."""

    gauge = True
    lock = threading.Lock()

    def pause(self):
        time.sleep(self.step_s)

    def events(self, body):
        with self.lock:
            yield from super().events(body)


@pytest.mark.parametrize("mode", ["copies", "mixed"])
def test_a_gauge_is_held_to_the_streams(odd, measure, mode):
    judgement, summary, _ = measure(odd(CountsWhatWaits), mode=mode, batch_sizes=(1, 4))
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert "thinner than asked for most of the time" in " ".join(judgement.verdict.reasons)
    (reached,) = summary.probes[0].serving.reached
    assert reached.asked == 4
    assert 2 * reached.n_alone > reached.n_tokens


@pytest.mark.parametrize("arrival", ["closed", "poisson:200"])
def test_a_gauge_is_held_to_the_streams_of_loops(odd, measure, arrival):
    loop = {**MIXED, "batch_sizes": (4,), "arrival": arrival}
    judgement, summary, _ = measure(odd(CountsWhatWaits), **loop)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    (reached,) = summary.probes[0].serving.reached
    # On a busy machine a stream's last event may come when the next one's first does.
    assert 2 * reached.n_alone > reached.n_tokens


class CutsPromptUnderLoad:
    """As servers do that have less room for each of several; here the text is the same."""

    def usage(self, body, n):
        return {"prompt_tokens": 5 if self.running < 2 else 3, "completion_tokens": n}


def test_another_prompt_than_the_one_that_was_sent_is_said(odd, measure):
    judgement, *_ = measure(odd(CutsPromptUnderLoad))
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert "the server counts 5, then 3 tokens in one prompt" in " ".join(judgement.verdict.reasons)


class OtherFingerprintByPrompt:
    """Another replica answers the second prompt."""

    def events(self, body):
        name = "fp_2" if "else:" in str(body["messages"]) else "fp_1"
        for event in super().events(body):
            yield {**event, "system_fingerprint": name}


def test_what_changes_from_one_prompt_to_the_next_is_said(odd, measure):
    probes = (Probe("p1", "class Queue:"), Probe("p2", "else:"))
    judgement, *_ = measure(odd(OtherFingerprintByPrompt), probes=probes)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    changed = "the server's system_fingerprint changed in mid-run: 'fp_1', then 'fp_2'"
    assert changed in judgement.verdict.reasons


class StickyReplicas:
    """One of eight replicas is bad; each connection stays with one."""

    def pause(self):
        pass

    def setup(self):
        super().setup()
        self.replica = next(type(self).numbers) % 8

    def text(self, t, token):
        return " other" if self.replica == 3 else token


class StickyByCookie(StickyReplicas):
    """Whoever brings a cookie stays with its replica."""

    def refuse(self, path, body):
        self.replica = int(self.headers.get("cookie", f"={self.replica}").rpartition("=")[2])

    def end_headers(self):
        self.send_header("set-cookie", f"replica={self.replica}")
        super().end_headers()


@pytest.mark.parametrize("handler", [StickyReplicas, StickyByCookie])
def test_every_trial_is_a_draw_of_a_replica(odd, measure, handler):
    alone = {"axes": ("run-to-run",), "batch_sizes": (1,), "n_samples": 20}
    judgement, _, samples = measure(odd(handler), **alone)
    assert judgement.verdict.outcome == "FAIL"
    assert len({sample.witness.connection for sample in samples}) == len(samples)


class OpenLoop:
    def pause(self):
        time.sleep(0.01)


def test_an_open_loop_is_judged_by_what_it_reached(odd, measure):
    apart = {**MIXED, "batch_sizes": (3,), "n_samples": 6}
    judgement, summary, _ = measure(odd(OpenLoop), arrival="bursts:1:0.6", **apart)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("most ran alone: batches of 1 (" in r for r in judgement.verdict.reasons)
    (reached,) = summary.probes[0].serving.reached
    assert reached.tokens_by_size == ((1, reached.n_tokens),)


class SlowFirst:
    """Under others' load while it is timed, by prompts that no cache holds; idle afterwards."""

    n_slow = 3

    def stream(self, body):
        known = self.state.setdefault("prompt", body["messages"])
        if body["messages"] != known and next(type(self).numbers) < self.n_slow:
            time.sleep(0.5)
        return super().stream(body)


class SlowCache(SlowFirst):
    n_slow = 10**6


@pytest.mark.parametrize(("server", "outcome"), [(SlowFirst, "PASS"), (SlowCache, "INCONCLUSIVE")])
def test_a_server_that_was_slow_while_it_was_timed_is_timed_again(odd, measure, server, outcome):
    judgement, summary, _ = measure(odd(server))
    assert judgement.verdict.outcome == outcome, judgement.verdict
    assert bool(summary.probes[0].serving.n_replayed) == (outcome != "PASS")
