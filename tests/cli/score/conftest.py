"""A computer that is a function of token ids, what it recorded, and a server that has it."""

from __future__ import annotations

import http.server
import json
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

N_TOKENS = 120
PLANTED_AT = 97


def logprob(before, token_id):
    """Of a token after those before it: an fp32 number."""
    return float(np.float32(-8 * zlib.crc32(repr((before, token_id)).encode()) / 2**32))


def scores(prompt_ids, token_ids):
    ids = [*prompt_ids, *token_ids]
    return [logprob(ids[:i], ids[i]) for i in range(len(prompt_ids), len(ids))]


def plant(values):
    """The same with one unit in the last place more at one index."""
    planted = list(values)
    planted[PLANTED_AT] = float(np.nextafter(np.float32(planted[PLANTED_AT]), np.float32(-99)))
    return planted


def lines(n=3, change=list):
    rng = np.random.default_rng(0)
    for _ in range(n):
        prompt_ids, token_ids = (rng.integers(3, 999, size).tolist() for size in (3, N_TOKENS))
        values = change(scores(prompt_ids, token_ids))
        yield {"prompt_ids": prompt_ids, "completion_ids": token_ids, "logprobs": values}


@pytest.fixture
def computer():
    """What it gives tokens, lines of a file that recorded it, and a planted fault."""
    return SimpleNamespace(scores=scores, lines=lines, plant=plant, planted_at=PLANTED_AT)


@pytest.fixture
def write_lines(tmp_path):
    def write(name, documents):
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(each)}\n" for each in documents))
        return path

    return write


@pytest.fixture
def recorded(write_lines):
    """A file of what the computer recorded."""
    return write_lines("recorded.jsonl", lines())


def vllm_answer(ids, found):
    entries = [{str(i): {"logprob": x, "rank": 1}} for i, x in zip(ids[1:], found, strict=True)]
    return {"choices": [{"index": 0, "text": "x", "prompt_logprobs": [None, *entries]}]}


def sglang_answer(ids, found):
    triples = [[x, i, None] for i, x in zip(ids, [None, *found], strict=True)]
    return {"text": "x", "meta_info": {"input_token_logprobs": triples}}


FAULTS = {
    "none": lambda answer: answer,
    "no-scores": lambda answer: {"choices": [{"index": 0, "text": "x"}]},
    "no-choice": lambda answer: {"choices": [7]},
    "short": lambda answer: _changed(answer, lambda entries: entries[:-1]),
    "other-ids": lambda answer: _changed(answer, lambda entries: [None, *[{"1": 1}] * 122]),
    "text": lambda answer: _logprob(answer, "-1.5"),
    "nan": lambda answer: _logprob(answer, float("nan")),
    "positive": lambda answer: _logprob(answer, 3.5),
    "huge": lambda answer: _logprob(answer, -1e30),
    "true": lambda answer: _logprob(answer, True),
    "bad-rank": lambda answer: _changed(
        answer, lambda e: [*e[:-1], {k: {**v, "rank": -3} for k, v in e[-1].items()}]
    ),
}


def _changed(answer, change):
    (choice,) = answer["choices"]
    return {"choices": [{**choice, "prompt_logprobs": change(choice["prompt_logprobs"])}]}


def _logprob(answer, value):
    return _changed(
        answer, lambda e: [*e[:-1], {key: {"logprob": value, "rank": 1} for key in e[-1]}]
    )


@pytest.fixture
def served():
    """``served(fault=..., kind=...)``: the address of a server that scores ids, and its bodies."""
    servers = []

    def start(fault="none", kind="vllm", change=list, refusals=()):
        bodies, statuses = [], list(refusals)

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *words):
                pass

            def do_GET(self):
                pages = {"/v1/models": {"data": [{"id": "m", "owned_by": "vllm"}]}}
                if kind == "sglang":
                    pages["/server_info"] = {"model_path": "m", "version": "0.5"}
                found = pages.get(self.path.partition("?")[0])
                self._send(404 if found is None else 200, found or {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                bodies.append({"path": self.path, **body})
                if statuses:
                    self._send(statuses.pop(0), {"error": {"message": "not now"}})
                    return
                ids = body["input_ids" if kind == "sglang" else "prompt"]
                found = [*scores(ids[:1], ids[1:3]), *change(scores(ids[:3], ids[3:]))]
                answer = sglang_answer if kind == "sglang" else vllm_answer
                self._send(200, FAULTS[fault](answer(ids, found)))

            def _send(self, status, document):
                content = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/v1", bodies

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()
