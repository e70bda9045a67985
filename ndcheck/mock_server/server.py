"""HTTP by hand, since half of the faults are ways to break it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from dataclasses import dataclass
from typing import Any

from ndcheck.mock_server import shapes
from ndcheck.mock_server.engine import ScriptedEngine, Token
from ndcheck.mock_server.faults import STREAM_FAULTS

Json = dict[str, Any]
PATHS = {"/v1/completions", "/v1/chat/completions", "/generate"}
KNOWN_TO_TEXT = {"model", "prompt", "messages", "max_tokens", "temperature", "stream", "seed"}
FOR_EVER_S = 3600.0
HUGE = 10 * 2**20
FINGERPRINT = "fp_mock"
BREAKS = frozenset({"stall", "truncate", "slow-loris", "utf8", "huge"})


@dataclass(frozen=True, slots=True)
class Plan:
    """How the server behaves.

    A fault that strikes by number hits every ``every``-th request for a completion, from number
    ``after`` on; a stream fault follows from what runs together. A step takes ``step_s`` seconds.
    """

    fault: str = "none"
    flavour: str = "vllm"
    after: int = 0
    every: int = 1
    max_batch: int = 256
    step_s: float = 0.002


class MockServer:
    """One event loop's server."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._engine = ScriptedEngine(
            plan.fault, plan.max_batch, plan.step_s, is_polled=plan.flavour in shapes.GAUGES
        )
        self._numbers = itertools.count()

    async def serve(self, host: str, port: int, on_listening: Any) -> None:
        """Serve for ever; ``on_listening`` is called with the port."""
        server = await asyncio.start_server(self._serve_connection, host, port, backlog=1024)
        stepping = asyncio.create_task(self._engine.run())
        try:
            on_listening(server.sockets[0].getsockname()[1])
            await stepping
        finally:
            server.close()

    async def _serve_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        gone = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.closing(writer), contextlib.suppress(*gone):
            while await self._serve_request(reader, writer):
                await writer.drain()

    async def _serve_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """False where the connection has to be closed."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = {
            name.lower(): value.strip() for name, _, value in (h.partition(":") for h in head)
        }
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if method == "GET":
            if path == "/flush_cache":
                self._engine.flush_cache()
            n_running = self._engine.poll() if path == "/metrics" else 0
            found = shapes.page(self._plan.flavour, path, n_running)
            kind, content = found or ("application/json", b'{"detail":"Not Found"}')
            _send(writer, 200 if found else 404, kind, content)
            return True
        if path not in PATHS or not self._has(path):
            _send(writer, 404, "application/json", b'{"detail":"Not Found"}')
            return True
        return await self._complete(writer, path, json.loads(body), headers)

    def _has(self, path: str) -> bool:
        if path == "/generate":
            return self._plan.flavour == "sglang"
        return self._plan.flavour != "hosted" or path == "/v1/chat/completions"

    async def _complete(
        self, writer: asyncio.StreamWriter, path: str, fields: Json, headers: dict[str, str]
    ) -> bool:
        plan = self._plan
        number = next(self._numbers) - plan.after
        strikes = number >= 0 and number % plan.every == 0 and plan.fault not in STREAM_FAULTS
        fault = plan.fault if strikes else "none"
        if fault == "reset":
            return False
        if error := _error(fault, fields, headers, plan.flavour):
            _send(writer, *error)
            return True
        if path == "/generate":
            await self._generate(writer, fields)
            return True
        return await self._answer(writer, fields, "chat" in path, fault)

    def _tokens(self, prompt: str, max_tokens: int, fields: Json) -> Any:
        key: str | None = f"{fields.get('cache_salt')}/{prompt}"
        if self._plan.flavour == "llama.cpp" and fields.get("cache_prompt") is False:
            key = None
        return self._engine.generate(prompt, max_tokens, int(fields.get("seed") or 0), key)

    async def _generate(self, writer: asyncio.StreamWriter, fields: Json) -> None:
        n = int(fields["sampling_params"]["max_new_tokens"])
        n_prompt = len(fields["text"].split())
        streamed = bool(fields.get("stream"))
        tokens: list[Token] = []
        content: Json = {}
        if streamed:
            writer.write(_head("text/event-stream"))
        async for request, token in self._tokens(fields["text"], n, fields):
            tokens.append(token)
            n_cached = n_prompt if request.is_cached else 0
            content = shapes.generated(tokens, n, shapes.usage(n_prompt, len(tokens), n_cached))
            if streamed:
                _write(writer, _event(content))
                await writer.drain()
        if streamed:
            _write(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
        else:
            _send(writer, 200, "application/json", json.dumps(content).encode())

    async def _answer(
        self, writer: asyncio.StreamWriter, fields: Json, chat: bool, fault: str
    ) -> bool:
        flavour, streamed = self._plan.flavour, bool(fields.get("stream"))
        prompt = fields["messages"][-1]["content"] if chat else fields["prompt"]
        n_asked = int(fields.get("max_completion_tokens") or fields["max_tokens"])
        n = max(1, n_asked - 1) if fault == "short" else n_asked
        fingerprint = "fp_other" if fault == "fingerprint" else FINGERPRINT
        writer.write(_head("text/event-stream" if streamed else "application/json"))
        tokens: list[Token] = []
        n_cached = 0
        async for request, token in self._tokens(prompt, n, fields):
            n_cached = len(prompt.split()) if request.is_cached else 0
            tokens.append(token)
            choice = shapes.chunk(flavour, chat, [token], fields)
            if len(tokens) == 1 and not chat:
                choice |= shapes.prompt_ids(flavour, prompt, fields)
            event = _event(shapes.frame([choice], fingerprint))
            if len(tokens) > n // 2 and fault in BREAKS:
                return await _break(writer, fault, event if streamed else b"{")
            if streamed:
                _write(writer, event)
                await writer.drain()
        counts = shapes.usage(len(prompt.split()), len(tokens) + (fault == "token-count"), n_cached)
        choice = shapes.chunk(flavour, chat, [] if streamed else tokens, fields)
        if not streamed and not chat:
            choice |= shapes.prompt_ids(flavour, prompt, fields)
        choice["finish_reason"] = "length"
        if streamed:
            has_usage = flavour == "text" or "stream_options" in fields
            _write(writer, _event(shapes.frame([choice], fingerprint)))
            if has_usage:
                _write(writer, _event(shapes.frame([], fingerprint, counts)))
            _write(writer, b"data: [DONE]\n\n")
        else:
            _write(writer, json.dumps(shapes.frame([choice], fingerprint, counts)).encode())
        writer.write(b"0\r\n\r\n")
        return True


def _error(
    fault: str, fields: Json, headers: dict[str, str], flavour: str
) -> tuple[int, str, bytes, str] | None:
    """Status, content type, body and another header of an answer that is no completion."""
    json_type = "application/json"
    if fault == "rate-limit":
        return 429, json_type, b'{"error":{"message":"too many requests"}}', "retry-after: 0"
    if fault == "error":
        return 500, json_type, b'{"error":{"message":"engine is dead"}}', ""
    if fault == "html":
        return 502, "text/html", b"<html><body><h1>Bad Gateway</h1></body></html>", ""
    if fault == "redirect":
        return 307, json_type, b"", "location: http://other.example/v1/completions"
    if fault == "repeat-key":
        words = {"error": {"message": f"bad key: {headers.get('authorization')}"}}
        return 400, json_type, json.dumps(words).encode(), ""
    if fields.get("model", shapes.MODEL) != shapes.MODEL:
        return 404, json_type, b'{"error":{"message":"no such model"}}', ""
    if flavour == "hosted" and "max_tokens" in fields:
        return 400, json_type, b'{"error":{"message":"use max_completion_tokens instead"}}', ""
    if flavour == "text" and (unknown := set(fields) - KNOWN_TO_TEXT):
        return 422, json_type, json.dumps({"detail": f"unexpected {sorted(unknown)}"}).encode(), ""
    return None


async def _break(writer: asyncio.StreamWriter, fault: str, event: bytes) -> bool:
    """End a stream in the middle, in the way of the fault."""
    if fault == "stall":
        await asyncio.sleep(FOR_EVER_S)
    if fault == "slow-loris":
        for byte in event * 100:
            _write(writer, bytes([byte]))
            await writer.drain()
            await asyncio.sleep(1)
    if fault == "utf8":
        _write(writer, b'data: {"choices": [{"text": "\xff\xfe"}]}\n\n')
    if fault == "huge":
        for _ in range(HUGE // 2**16):
            _write(writer, b"x" * 2**16)
            await writer.drain()
    writer.write(b"0\r\n\r\n")
    return True


def _head(kind: str) -> bytes:
    """Of an answer in chunks."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n"
    return head.encode()


def _event(document: Json) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """One chunk of a chunked body."""
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def _send(
    writer: asyncio.StreamWriter, status: int, kind: str, content: bytes, header: str = ""
) -> None:
    head = f"HTTP/1.1 {status} \r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\n"
    writer.write((head + (header + "\r\n" if header else "") + "\r\n").encode() + content)
