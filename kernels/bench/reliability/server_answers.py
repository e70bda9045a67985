"""Mutated answers through the real client.

    PYTHONPATH=kernels python -m bench.reliability.server_answers [--count N] [--jobs J]

A server on loopback, in this process, answers `ndcheck run --endpoint` and spoils a part of its
answers: what they say beside the completion (facts), how it is framed, its text, the pages that say
who the server is, any part of the JSON (fields: junk for a value, one taken out, put in or
repeated), bytes, HTTP. Its model gives equal completions always: exit code 1 is wrong unless the
text was spoilt, 0 is wrong where a fork was planted in a measured answer, and 2 and 4 are wrong
where only facts or the framing were. Every exception that leaves the command line, every run of
more than LIMIT_S and every wrong exit code is counted, until N answers (5000) were spoilt by J
processes together.

Writes results/reliability/server_answers.csv, and its environment beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.reliability.processes import in_processes
from ndcheck import environment
from ndcheck.cli.app import run_command_line

LIMIT_S = 60
N_PROBING = 24
"""Requests that are over before the first trial at the latest."""
STEP_S = 0.002
RESULTS = Path(__file__).parents[3] / "results" / "reliability"
SEEDS_A_PROCESS = 100_000
PROMPT = "class Queue:"
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    float("-inf"), -3.4028234663852886e38, "", "x", "\ud800", "\x00\x1b[2J", "a" * 3000, [], [[]],
    [None], {}, {"a": None}, {"error": None}, ["text"], [{"type": "text", "text": "t"}], "null",
    [[[[[[]]]]]], {"type": "length"}, "stop", "length", "content_filter", "[DONE]",
]  # fmt: skip
FACTS = ("id", "object", "created", "model", "system_fingerprint", "usage", "service_tier")
"""Of an answer but not of its completion: whatever they hold, the completion is the same."""
BYTES = [
    b"", b"\n", b"\r\n\r\n", b"data: [DONE]\n\n", b"data: \n\n", b": ping\n\n", b"event: error\n",
    b"data: {}\n\n", b"data: null\n\n", b"data: [1]\n\n", b"{", b"}", b"\xff\xfe", b"\x00" * 64,
    b"error: {}\n\n", b'data: {"error": {"message": "x", "code": 503}}\n\n', b"data: {\n\n",
    b'{"object": "error", "message": "x"}\n', b"data: " + b"[" * 5000 + b"\n\n", b"x" * 70000,
]  # fmt: skip
HEADS = [
    b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: -4\r\ncontent-encoding: br\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\nconnection: close\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 301 Moved\r\nlocation: \xff\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 429 Busy\r\nretry-after: Sun, 99 Foo\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 503 Busy\r\nretry-after: nan\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 500 Oops\r\nconnection: close\r\n\r\n<html>",
    b"HTTP/1.1 999 What\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/2 200\r\n\r\n",
    b"\x16\x03\x01garbage",
    b"",
]


@dataclass
class Tally:
    """What was spoilt in one run: how often, in which ways, and whether a completion was.

    ``forked``: the text of a measured answer was made another, and nothing else was wrong.
    """

    n: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    changed_text: bool = False
    forked: bool = False


class Server:
    """Answers in the shapes of vLLM, streamed and whole, and spoils what `rng` chooses."""

    def __init__(self, rng: random.Random, kinds: tuple[str, ...], rate: float) -> None:
        self.rng, self.kinds, self.rate = rng, kinds, rate
        self.tally = Tally()
        self.n_running = 0
        self.spares_probing = rng.random() < 0.7
        self.n_posts = 0

    def spoils(self) -> str | None:
        """How to spoil the next answer, if at all."""
        if self.rng.random() >= self.rate or (self.spares_probing and self.n_posts < N_PROBING):
            return None
        kind = self.rng.choice(self.kinds)
        if kind == "pages":
            return None
        self.tally.n += 1
        self.tally.kinds[kind] += 1
        return kind

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        gone = (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)
        with contextlib.suppress(*gone), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                n = head.partition("content-length: ")[2].partition("\r\n")[0]
                body = await reader.readexactly(int(n or 0))
                method, path, _ = head.split(" ", 2)
                if method == "get":
                    self.write_page(writer, path)
                elif not await self.complete(writer, json.loads(body)):
                    return
                await writer.drain()

    def write_page(self, writer: asyncio.StreamWriter, path: str) -> None:
        pages: dict[str, Any] = {
            "/v1/models": {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]},
            "/version": {"version": "1.0"},
        }
        page = pages.get(path, {"detail": "Not Found"})
        if path in pages and "pages" in self.kinds and self.rng.random() < 0.5:
            self.tally.n += 1
            page = mutate(page, self.rng)
        content = json.dumps(page).encode()
        if path == "/metrics":
            content = b"vllm:num_requests_running{} %d.0\n" % self.n_running
        status = b"200 OK" if path in pages or path == "/metrics" else b"404 Not Found"
        writer.write(
            b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n" % (status, len(content)) + content
        )

    async def complete(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> bool:
        """False where the connection is to be closed."""
        self.n_posts += 1
        kind, n = self.spoils(), int(body["max_tokens"])
        if kind == "text":
            self.tally.forked |= body["prompt"] == PROMPT and self.n_posts >= N_PROBING
        if kind == "http":
            writer.write(self.rng.choice(HEADS))
            return False
        self.n_running += 1
        try:
            events = [self.event(body, [t]) for t in range(n)]
            last = self.event(body, [])
            last["choices"][0]["finish_reason"] = "length"
            usage = {"usage": {"prompt_tokens": 3, "completion_tokens": n}}
            if not body.get("stream"):
                await asyncio.sleep(STEP_S * n)
                whole = {**self.event(body, list(range(n))), **usage}
                whole["choices"][0]["finish_reason"] = "length"
                events, last = [], whole
            at = self.rng.randrange(len(events) + (kind != "text") or 1)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                         b"transfer-encoding: chunked\r\n\r\n")  # fmt: skip
            frames = [*events, last]
            if body.get("stream") and "stream_options" in body:
                frames.append({"choices": [], **usage})
            for t, event in enumerate(frames):
                if body.get("stream"):
                    await asyncio.sleep(STEP_S)
                content = self.frame(event, kind if t == at else None, body)
                if content is None:
                    return False
                if content:
                    writer.write(b"%x\r\n%s\r\n" % (len(content), content))
                await writer.drain()
            if body.get("stream"):
                writer.write(b"e\r\ndata: [DONE]\n\n\r\n")
            writer.write(b"0\r\n\r\n")
        finally:
            self.n_running -= 1
        return True

    def event(self, body: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": "".join(f" w{t}" for t in tokens)}
        choice["finish_reason"] = None
        if body.get("return_token_ids"):
            choice["token_ids"] = tokens
        if body.get("logprobs"):
            choice["logprobs"] = {
                "tokens": [f" w{t}" for t in tokens],
                "token_logprobs": [-0.123456789 for _ in tokens],
                "top_logprobs": [{f" w{t}": -0.123456789, "x": -2.5} for t in tokens],
            }
        return {"id": f"cmpl-{self.rng.random()}", "choices": [choice], "system_fingerprint": "fp"}

    def frame(self, event: Any, kind: str | None, body: dict[str, Any]) -> bytes | None:
        """The event as it is sent; None to hang up."""
        start, end = (b"data: ", b"\n\n") if body.get("stream") else (b"", b"")
        if kind == "facts":
            for name in self.rng.sample(FACTS, 3):
                event = {**event, name: self.rng.choice(JUNK)}
        elif kind == "text":
            self.tally.changed_text = True
            choice, other = event["choices"][0], f" fork {self.rng.random()}"
            choice["text"] = other
            if "token_ids" in choice:
                choice["token_ids"] = [self.rng.randrange(1000, 2**31) for _ in choice["token_ids"]]
            if "logprobs" in choice:
                choice["logprobs"]["tokens"] = [other for _ in choice["logprobs"]["tokens"]]
        elif kind == "fields":
            before = json.dumps(event)
            event = mutate(event, self.rng)
            self.tally.changed_text |= json.dumps(event) != before
        content = start + json.dumps(event).encode() + end
        if kind == "framing":
            content = self.rng.choice([
                content.replace(b"\n", b"\r\n"), b": ping\n\n" + content, b"\n\n" + content,
                b"id: 7\nevent: message\nretry: 3\n" + content, b"data:\n\n" + content,
                content.replace(b"data: ", b"data:"), content + b"\n\n",
            ])  # fmt: skip
            if not body.get("stream"):
                content = json.dumps(event, indent=1).encode()
        elif kind == "bytes":
            self.tally.changed_text = True
            junk = self.rng.choice(BYTES)
            at = self.rng.randrange(len(content) + 1)
            choice = self.rng.randrange(4)
            if choice == 3:
                return None
            content = (junk, content[:at] + junk + content[at:], content[:at])[choice]
        return content


def mutate(value: Any, rng: random.Random) -> Any:
    """A copy with one part, at any depth, replaced, taken out, repeated or moved."""
    value = json.loads(json.dumps(value))
    holder, depth = value, 0
    while isinstance(holder, (dict, list)) and holder:
        name = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if isinstance(holder[name], (dict, list)) and holder[name] and rng.random() < 0.75:
            holder, depth = holder[name], depth + 1
            continue
        action = rng.randrange(5)
        if action == 0:
            del holder[name]
        elif action == 1 and isinstance(holder, list):
            holder.append(holder[name])
        elif action == 1:
            holder[rng.choice(["error", "detail", "index", "delta", "message"])] = rng.choice(JUNK)
        elif action == 2:
            holder[name] = [holder[name]] if rng.random() < 0.5 else {"text": holder[name]}
        else:
            holder[name] = rng.choice(JUNK)
        return value
    return rng.choice(JUNK)


def is_wrong(code: int, tally: Tally, kinds: tuple[str, ...]) -> bool:
    """A false accusation, a pass over a fork, or a refusal of completions that are all there."""
    if code == 1:
        return not tally.changed_text
    if code == 0:
        return tally.forked
    return code not in ((3,) if kinds in (("facts",), ("framing",), ("text",)) else (2, 3, 4))


def run_once(seed: int, kinds: tuple[str, ...]) -> tuple[int | str, Tally, str]:
    """The exit code, or the exception that left the command line; what was spoilt; the screen."""
    rng = random.Random(seed)
    server = Server(rng, kinds, rng.choice((0.05, 0.2, 0.5, 1.0)))
    listening = threading.Event()
    at: dict[str, Any] = {}

    async def serve() -> None:
        at.update(loop=asyncio.get_running_loop(), stop=asyncio.Event())
        at["loop"].set_exception_handler(lambda loop, context: None)
        async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listener:
            at["port"] = listener.sockets[0].getsockname()[1]
            listening.set()
            await at["stop"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    listening.wait()
    command = [
        "run", "--endpoint", f"http://127.0.0.1:{at['port']}/v1", "--model", "m", "--loads", "1,2",
        "-n", "10", "--max-tokens", "6", "--retries", rng.choice("01"), "--timeout", "5",
        "--mode", rng.choice(("copies", "mixed")), "--json",
        *(["--allow-latent"] if rng.random() < 0.3 else []),
    ]  # fmt: skip
    screen = io.StringIO()
    code: int | str
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        try:
            with (
                contextlib.redirect_stdout(Stream(screen)),
                contextlib.redirect_stderr(Stream(screen)),
            ):
                code = run_command_line(command)
        except BaseException:
            code = traceback.format_exc()
        finally:
            os.chdir(before)
            at["loop"].call_soon_threadsafe(at["stop"].set)
            thread.join()
    if "Traceback" in screen.getvalue() or "report this" in screen.getvalue():
        code = screen.getvalue()
    return code, server.tally, screen.getvalue()


class Stream(io.TextIOWrapper):
    """A stream for the command line that keeps what is written."""

    def __init__(self, kept: io.StringIO) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self._kept = kept

    def write(self, text: str) -> int:
        return self._kept.write(text)


KINDS = (
    ("facts",), ("framing",), ("text",), ("pages",), ("fields",), ("bytes",), ("http",),
    ("facts", "framing", "text", "pages", "fields", "bytes", "http"),
)  # fmt: skip


def answer_wrongly(n_answers: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Counts by what was spoilt, and what is needed to see each wrong end again."""

    def hang(signum: int, frame: Any) -> None:
        raise TimeoutError(f"no end within {LIMIT_S} s")

    signal.signal(signal.SIGALRM, hang)
    rows: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    n = 0
    for number in itertools.count(seed * SEEDS_A_PROCESS):
        if n >= n_answers:
            break
        kinds = KINDS[number % len(KINDS)]
        signal.alarm(LIMIT_S)
        code, tally, screen = run_once(number, kinds)
        signal.alarm(0)
        row = rows.setdefault("+".join(kinds), Counter())
        n += tally.n
        row.update(runs=1, answers=tally.n)
        if isinstance(code, str):
            row["hangs" if "no end within" in code else "uncaught"] += 1
        else:
            row[f"exit {code}"] += 1
            row["wrong"] += is_wrong(code, tally, kinds)
        if isinstance(code, str) or is_wrong(code, tally, kinds):
            wrong.append(f"seed {number}, {kinds}: {code}\n{screen[-1500:]}")
    return rows, wrong


def main() -> int:
    """Write the table; returns how many runs ended wrongly."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: dict[str, Counter[str]] = {}
    n_wrong = 0
    for part, wrong in in_processes(answer_wrongly, options.count, options.seed, options.jobs):
        n_wrong += len(wrong)
        for line in wrong:
            print(line, flush=True)
        for kinds, counts in part.items():
            rows.setdefault(kinds, Counter()).update(counts)
    exits = [f"exit {code}" for code in range(5)]
    names = ["runs", "answers", *exits, "uncaught", "hangs", "wrong"]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "server_answers.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["spoilt", *names])
        for kinds, row in rows.items():
            table.writerow([kinds, *(row[name] for name in names)])
        total = sum(rows.values(), Counter())
        table.writerow(["all", *(total[name] for name in names)])
    machine = dataclasses.asdict(environment.capture({}))
    facts = {"seed": options.seed, "jobs": options.jobs, "environment": machine}
    (options.out / "server_answers.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(path.read_text())
    return n_wrong


if __name__ == "__main__":
    sys.exit(bool(main()))
