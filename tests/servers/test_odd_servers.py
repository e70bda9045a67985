"""Servers as they are found: each ends in the verdict that it deserves, or in one clear line."""

from __future__ import annotations

import base64
import email.utils
import itertools
import json
import random
import re
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ndcheck.cli.app import run_command_line
from ndcheck.errors import BackendError, UsageError

WORDS = [f" w{i}" for i in range(40)]
LOWEST = -3.4028234663852886e38
GATHER_S = 0.03


class Batch:
    """Gives each request that runs a token a step, once all of them have had the last one.

    So requests that were sent together run together, however busy the machine is.
    """

    def __init__(self):
        self.changed = threading.Condition()
        self.n_members = self.n_waiting = self.n_steps = 0
        self.opens_s = 0.0
        self.is_stepping = False

    def join(self):
        with self.changed:
            if not self.n_members:
                self.opens_s = time.monotonic() + GATHER_S
            self.n_members += 1

    def leave(self):
        with self.changed:
            self.n_members -= 1
            self.changed.notify_all()

    def step(self, step_s):
        with self.changed:
            self.n_waiting += 1
            before = self.n_steps
            while self.n_steps == before:
                if self.n_waiting < self.n_members or self.is_stepping:
                    self.changed.wait(1)
                    continue
                self.is_stepping = True
                end_s = max(self.opens_s, time.monotonic() + step_s)
                while (left_s := end_s - time.monotonic()) > 0:
                    self.changed.wait(left_s)
                self.is_stepping = False
                if self.n_waiting >= self.n_members:
                    self.n_steps, self.n_waiting = self.n_steps + 1, 0
                self.changed.notify_all()


class Server(BaseHTTPRequestHandler):
    """A plain server that streams text; cases override what is odd about theirs."""

    protocol_version = "HTTP/1.1"
    content_type = "text/event-stream"
    done = b"data: [DONE]\n\n"
    step_s = 0.004
    gauge = False

    @classmethod
    def reset(cls):
        cls.batch, cls.numbers, cls.state = Batch(), itertools.count(), {}

    @property
    def running(self):
        return self.batch.n_members

    def pause(self):
        self.batch.step(self.step_s)

    def pages(self):
        pages = {"/v1/models": {"data": [{"id": "m", "object": "model"}]}}
        if self.gauge:
            pages["/metrics"] = f"vllm:num_requests_running {float(self.running)}\n"
        return pages

    def limit(self, body):
        return body.get("max_completion_tokens") or body["max_tokens"]

    def refuse(self, path, body):
        """Status, document and headers of a refusal."""

    def tokens(self, body):
        return WORDS[: self.limit(body)]

    def text(self, t, token):
        return token

    def fields(self, t, token, body):
        """More of a token's choice."""
        return {}

    def frame(self):
        """More of every event."""
        return {}

    def end(self, body):
        return "length"

    def usage(self, body, n):
        return {"prompt_tokens": 3, "completion_tokens": n}

    def events(self, body):
        tokens = self.tokens(body)
        chat = "messages" in body
        for t, token in enumerate(tokens):
            self.pause()
            text = self.text(t, token)
            part = {"delta": {"content": text}} if chat else {"text": text}
            yield {"choices": [{"index": 0, **part, **self.fields(t, token, body)}]}
        yield {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": self.end(body)}]}
        if body.get("stream_options") and (usage := self.usage(body, len(tokens))):
            yield {"choices": [], "usage": usage}

    def log_message(self, *arguments):
        pass

    def send(self, status, content, kind="application/json", **headers):
        self.send_response(status)
        for name, value in {
            "content-type": kind,
            "content-length": len(content),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        page = self.pages().get(self.path)
        if page is None:
            return self.send(404, b'{"detail": "Not Found"}')
        content = page if isinstance(page, str) else json.dumps(page)
        return self.send(200, content.encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if refusal := self.refuse(self.path, body):
            status, document, headers = refusal
            return self.send(status, json.dumps(document).encode(), **headers)
        self.batch.join()
        try:
            return self.stream(body)
        finally:
            self.batch.leave()

    def write(self, content):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()

    def stream(self, body):
        self.send_response(200)
        self.send_header("content-type", self.content_type)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in self.events(body):
            content = event if isinstance(event, bytes) else json.dumps({**event, **self.frame()})
            self.write(content if isinstance(event, bytes) else b"data: %s\n\n" % content.encode())
        if self.done:
            self.write(self.done)
        self.wfile.write(b"0\r\n\r\n")
        return


class Listener(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        pass  # A client that hangs up is no error here.


@pytest.fixture
def odd():
    """Starts servers of a handler's kind: the address of each."""
    started = []

    def start(handler):
        handler.reset()
        server = Listener(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        started.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}/v1"

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


SMALL = {"model": "m", "axes": ("run-to-run", "batch-size"), "n_samples": 11, "chat": True}


class EmptyReason(Server):
    def fields(self, t, token, body):
        return {"finish_reason": "", "matched_stop": None}


class EosToken(Server):
    def end(self, body):
        return "eos_token"


class NoReason(Server):
    def end(self, body):
        return None


class EstimatedUsage(Server):
    def usage(self, body, n):
        return {"prompt_tokens": 0, "completion_tokens": max(1, n * 3 // 4)}


class NoUsage(Server):
    def usage(self, body, n):
        return {"prompt_tokens": None, "completion_tokens": 0}


class PlainText(Server):
    content_type = "text/plain; charset=utf-8"


class Lines(Server):
    content_type = "application/x-ndjson"
    done = b""

    def events(self, body):
        for event in super().events(body):
            yield json.dumps(event).encode() + b"\n"


class Parts(Server):
    def fields(self, t, token, body):
        return {"delta": {"content": [{"type": "text", "text": token}]}}


class LowestAlternative(Server):
    def fields(self, t, token, body):
        others = [None, float("-inf"), -9999.0, LOWEST, -3.5]
        top = [{"token": token, "logprob": -0.01234567}, {"token": "x", "logprob": others[t % 5]}]
        entry = {"token": token, "logprob": -0.01234567, "top_logprobs": top}
        return {"logprobs": {"content": [entry]} if body.get("logprobs") else None}


class OddFacts(Server):
    """Pages and facts of any type."""

    def pages(self):
        page = {"data": 7, "version": [1], "model_path": {}, "default_generation_settings": "x"}
        return dict.fromkeys(("/v1/models", "/props", "/server_info", "/version"), page) | {
            "/metrics": "vllm:num_requests_running 1e999\nllamacpp:requests_processing {} x\n"
        }

    def frame(self):
        number = next(type(self).numbers)
        return {"system_fingerprint": [None, 3, {}, [], True][number % 5], "id": {"a": 1}}


class OwnFingerprints(Server):
    def stream(self, body):
        self.fingerprint = f"fp_{next(type(self).numbers)}"
        return super().stream(body)

    def frame(self):
        return {"system_fingerprint": self.fingerprint}


class OneId(Server):
    """The id says nothing: it is that of every request."""

    def frame(self):
        return {"id": "chatcmpl-0"}


class HoldsConnections(Server):
    """Goes on after the last event."""

    def stream(self, body):
        super().stream(body)
        time.sleep(0.05)


@pytest.mark.parametrize(
    "handler",
    [EmptyReason, EosToken, NoReason, EstimatedUsage, NoUsage, PlainText, Lines, Parts,
     LowestAlternative, OddFacts, OwnFingerprints, OneId, HoldsConnections],
)  # fmt: skip
def test_a_server_that_answers_well_passes(odd, measure, handler):
    judgement, summary, samples = measure(odd(handler), **SMALL)
    assert judgement.verdict.outcome == "PASS", judgement.verdict.reasons
    assert {sample.text for sample in samples if sample.role != "control"} == {"".join(WORDS[:12])}
    assert {sample.error for sample in samples} == {None}
    assert summary.probes[0].serving.n_connections == 11


class Forks(Server):
    """Forks where it has company, at the seventh token."""

    def text(self, t, token):
        return " other" if t == 6 and self.running > 1 else token


@pytest.mark.parametrize("base", [EmptyReason, NoReason, EstimatedUsage, PlainText, Parts])
def test_the_same_server_with_a_fork_fails(odd, measure, base):
    class Handler(Forks, base):
        def fields(self, t, token, body):
            return super().fields(t, self.text(t, token), body)

    judgement, *_ = measure(odd(Handler), **SMALL)
    assert judgement.verdict.outcome == "FAIL"


class WithoutNames(Server):
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
    judgement, summary, samples = measure(odd(WithoutNames), **SMALL)
    assert judgement.verdict.outcome == "FAIL"
    (probe,) = summary.probes
    assert probe.serving.names_differ == 0
    assert probe.serving.texts_differ > 0
    assert len({sample.witness.names_digest for sample in samples}) == 1


class HiddenText(Server):
    """Equal token ids, another text."""

    def fields(self, t, token, body):
        return {"token_ids": [t]} if body.get("return_token_ids") else {}

    def text(self, t, token):
        return " other" if t == 6 and self.running > 1 else token


def test_text_is_compared_besides_token_ids(odd, measure):
    judgement, *_ = measure(odd(HiddenText), **{**SMALL, "chat": False})
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("equal token ids and another text" in r for r in judgement.verdict.reasons)


class Caches(Server):
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


def test_whole_answers_from_a_cache_are_no_evidence(odd, measure):
    judgement, summary, _ = measure(odd(Caches), **SMALL)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("the response id of another answer" in r for r in judgement.verdict.reasons)
    assert summary.probes[0].n_unique == 1


def test_a_cache_is_seen_by_requests_that_differ_in_their_limit(odd, measure):
    judgement, *_ = measure(odd(CachesWithoutIds), **SMALL)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("differ in their limit alone" in r for r in judgement.verdict.reasons)


class Replays(Server):
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
    judgement, *_ = measure(odd(Replays), **{**SMALL, "batch_sizes": (1,), "n_samples": 5})
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("sooner than a first token can" in r for r in judgement.verdict.reasons)


class EarlyFillers(Server):
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
    **SMALL,
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
    assert "thinner than asked for at most tokens" in reasons


def decoding(n_tokens):
    from ndcheck.records import Decoding

    return Decoding(n_tokens)


class StickyReplicas(Server):
    """One of eight replicas is bad; each connection stays with one."""

    def pause(self):
        pass

    def setup(self):
        super().setup()
        self.replica = next(type(self).numbers) % 8

    def text(self, t, token):
        return " other" if self.replica == 3 else token


def test_every_trial_is_a_draw_of_a_replica(odd, measure):
    alone = {**SMALL, "axes": ("run-to-run",), "batch_sizes": (1,), "n_samples": 20}
    judgement, _, samples = measure(odd(StickyReplicas), **alone)
    assert judgement.verdict.outcome == "FAIL"
    assert len({sample.witness.connection for sample in samples}) == len(samples)


class OpenLoop(Server):
    def pause(self):
        time.sleep(0.01)


def test_an_open_loop_is_judged_by_what_it_reached(odd, measure):
    apart = {**MIXED, "batch_sizes": (3,), "n_samples": 6}
    judgement, summary, _ = measure(odd(OpenLoop), arrival="bursts:1:0.6", **apart)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("most ran alone: batches of 1 (" in r for r in judgement.verdict.reasons)
    (reached,) = summary.probes[0].serving.reached
    assert reached.tokens_by_size == ((1, reached.n_tokens),)


class HiddenReasoning(Server):
    def events(self, body):
        n = self.limit(body)
        yield {"choices": [{"delta": {"content": ""}, "finish_reason": "length"}]}
        details = {"reasoning_tokens": n}
        yield {
            "choices": [],
            "usage": {"completion_tokens": n, "completion_tokens_details": details},
        }


class Cuts(Server):
    """Has a limit of its own."""

    def fields(self, t, token, body):
        return {"token_ids": [t]}

    def tokens(self, body):
        return WORDS[: min(10, self.limit(body))]


class Gateway(Server):
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


class NoTemperature(Server):
    def refuse(self, path, body):
        if "max_tokens" in body:
            return 400, {"error": {"message": "send max_completion_tokens"}}, {}
        if body["temperature"] != 1:
            return 400, {"error": {"message": "temperature must be 1"}}, {}
        return None


class ChatAlone(Server):
    def refuse(self, path, body):
        if "chat" not in path:
            return 404, {"detail": "Not Found"}, {}
        return None


@pytest.mark.parametrize(
    ("handler", "chat", "kind", "words", "other"),
    [
        (HiddenReasoning, True, UsageError, "raise --max-tokens", "it offers"),
        (Cuts, True, BackendError, "10 of 12 tokens", "it offers"),
        (NoTemperature, True, UsageError, "temperature must be 1 (without temp", "it offers"),
        (ChatAlone, False, UsageError, "a server with chat alone needs --chat", "/v1)"),
        (Gateway, True, UsageError, "temperature 0 is not for you", "llama.cpp"),
    ],
)
def test_what_a_server_refuses_is_one_line_with_what_may_help(
    odd, measure, handler, chat, kind, words, other
):
    with pytest.raises(kind) as refused:
        measure(odd(handler), **{**SMALL, "chat": chat})
    assert words in str(refused.value)
    assert other not in str(refused.value)
    assert "\n" not in str(refused.value)


class Busy(Server):
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
    judgement, *_ = measure(odd(handler), **SMALL)
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
        measure(odd(Tomorrow), **SMALL)


class Repeats(Server):
    """Repeats the key wherever a server can put words, within the text in two parts."""

    @property
    def key(self):
        return self.headers["authorization"].removeprefix("Bearer ")

    def pages(self):
        return {
            "/v1/models": {"data": [{"id": "m", "root": self.key}]},
            "/version": {"version": f"1.0 for {self.key}"},
        }

    def refuse(self, path, body):
        if "prompt_logprobs" in body or "refuse" in body["prompt"]:
            words = f"{self.key}, {urllib.parse.quote(self.key)}, {base64_of(self.key)}"
            return 400, {"error": {"message": words, self.key: [self.key]}}, {"x_key": self.key}
        return None

    def text(self, t, token):
        half = (len(self.key) + 1) // 2
        return {4: f" {self.key[:half]}", 5: f"{self.key[half:]} "}.get(t, token)

    def end(self, body):
        number = next(type(self).numbers)
        return f"error {self.key}" if number > 24 and number % 4 == 0 else "length"

    def frame(self):
        return {"system_fingerprint": f"fp of {self.key}", "id": f"{self.key}-{random.random()}"}


def base64_of(key):
    return base64.b64encode(f"user:{key}".encode()).decode()


@pytest.mark.parametrize("key", ["sk-0123456789/abcdef", "Zq7x", "Z9", "Q"])
@pytest.mark.parametrize("prompt", ["class Queue:", "refuse"])
def test_a_key_is_in_nothing_that_is_written(odd, tmp_path, monkeypatch, capfd, key, prompt):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NDCHECK_API_KEY", key)
    monkeypatch.setenv("NDCHECK_DEBUG", "1")
    options = ("--model", "m", "--loads", "1,2", "-n", "8", "--max-tokens", "8", "--retries", "0")
    url = odd(Repeats)
    code = run_command_line(
        ["run", "--endpoint", url, *options, "--prompt", prompt, "--out", "run"]
        + ["--html"] * (len(key) > 1)  # The page's own scripts hold single letters.
    )
    assert code == (3 if prompt == "class Queue:" else 2)
    out, err = capfd.readouterr()
    written = [out, err, *(f.read_text() for f in tmp_path.rglob("*") if f.is_file())]
    assert len(written) > (8 if prompt == "class Queue:" else 1)
    assert "[secret]" in "".join(written)
    for form in (key, urllib.parse.quote(key, safe=""), base64_of(key)):
        found = re.compile(rf"(?<![0-9A-Za-z]){re.escape(form)}(?![0-9A-Za-z])")
        assert not [text for text in written if found.search(text)]


ADDRESSES = [
    "http://me:hunter2@host/v1", "htp://me:hunter2@host/v1", "http://me:hunter2@host:99999/v1",
    "me:hunter2@host/v1", "http://me:hunter2@[::1/v1", "http://me:hunter2%40host/v1",
    "http://host/v1?key=hunter2", "http://host/v1#hunter2", "http:// me:hunter2@host /v1",
    "//me:hunter2@host", "http://me:hunter2@\x00host/v1", "http://hunter2@/v1",
]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_a_password_is_never_shown(address, capfd, monkeypatch):
    assert run_command_line(["run", "--endpoint", address, "--model", "m"]) == 2
    monkeypatch.setenv("NDCHECK_ENDPOINT", address.replace("\x00", ""))
    assert run_command_line(["run", "--model", "m"]) == 2
    out, err = capfd.readouterr()
    assert "hunter2" not in out + err
    assert err.count("\n") == 2


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("HTTP_PROXY", "foo://me:hunter2@proxy:1", "the proxy settings in HTTP_PROXY cannot be"),
        ("HTTP_PROXY", "http://me:hunter2@proxy:notaport", "the proxy settings in HTTP_PROXY"),
        ("ALL_PROXY", "socks5://me:hunter2@127.0.0.1:9", "the proxy settings in ALL_PROXY"),
        ("HTTP_PROXY", "http://me:hunter2@127.0.0.1:9", "through the proxy of HTTP_PROXY"),
        ("SSL_CERT_FILE", "/does/not/exist.pem", "SSL_CERT_FILE=/does/not/exist.pem: "),
        ("SSL_CERT_FILE", __file__, f"SSL_CERT_FILE={__file__}: it holds no certificate"),
        ("SSL_CERT_FILE", "/", "SSL_CERT_FILE=/: "),
    ],
)
def test_settings_that_no_connection_can_be_made_with(
    odd, capfd, monkeypatch, variable, value, words
):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    code = run_command_line(
        ["run", "--endpoint", odd(Server), "--model", "m", "--retries", "0", "-q"]
    )
    out, err = capfd.readouterr()
    assert code == (4 if "through" in words else 2)
    assert words in err
    assert err.count("\n") == 1
    assert "hunter2" not in out + err
