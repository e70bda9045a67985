"""Plain servers over loopback that cases make odd."""

from __future__ import annotations

import itertools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

WORDS = [f" w{i}" for i in range(40)]
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
    """A plain server that streams text; a case's class comes before it, with what is odd."""

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
        page = self.pages().get(self.path.partition("?")[0])
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
    """Starts servers, plain or as a class says that they are: the address of each."""
    started = []

    def start(oddity=None):
        handler = type("Odd", (oddity, Server) if oddity else (Server,), {})
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


@pytest.fixture
def measure(measure):
    """The same, small."""
    small = {"model": "m", "axes": ("run-to-run", "batch-size"), "n_samples": 11, "chat": True}
    return lambda url, **changed: measure(url, **{**small, **changed})
