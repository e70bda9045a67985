"""HTTP to one server: pooled, streamed, bounded in size and time, every failure one clear line."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from ndcheck.samplers.endpoint.answer import RequestFailure

CONNECT_TIMEOUT_S = 10.0
MAX_ERROR_BYTES = 1 << 16
MAX_SNIPPET = 200
TEMPORARY = frozenset({408, 429, 500, 502, 503, 504, 529})
Event = dict[str, Any]


class Transport:
    """Connections to the server at ``url``, an OpenAI base such as ``.../v1``: as many as in use.

    Each is a client of its own, since a pool looks through all its connections at every request.
    Redirects are never followed: a key must not travel to another host. ``secrets`` are cut out
    of every message.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout_s: float) -> None:
        import httpx2

        self._httpx = httpx2
        self.base = url.rstrip("/")
        self.root = self.base.removesuffix("/v1")
        self._headers = {**headers, "accept-encoding": "identity"}
        self._timeout_s = timeout_s
        self._tls = httpx2.create_ssl_context()
        self._idle: list[Any] = []
        # With and without the scheme ("Bearer"), since a server may quote either.
        parts = (part for value in headers.values() for part in (value, *value.split()))
        self._secrets = sorted({part for part in parts if len(part) >= 6}, key=len, reverse=True)

    async def close(self) -> None:
        for client in self._idle:
            await client.aclose()

    def _make_client(self) -> Any:
        return self._httpx.AsyncClient(
            verify=self._tls,
            headers=self._headers,
            timeout=self._httpx.Timeout(self._timeout_s, connect=CONNECT_TIMEOUT_S),
            follow_redirects=False,
        )

    def redact(self, message: str) -> str:
        """``message`` on one line, without the secrets that the server may have repeated."""
        for secret in self._secrets:
            message = message.replace(secret, "[secret]")
        return message

    async def stream(
        self, url: str, body: Mapping[str, Any], max_bytes: int, take: Callable[[Event], None]
    ) -> None:
        """POST ``body`` and ``take`` each JSON object of the event stream, or a plain answer's.

        Raises RequestFailure for everything that is not one of these.
        """
        received = 0
        rest = b""
        async with self._sent("POST", url, body) as response:
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            is_events = kind == "text/event-stream"
            if not is_events and kind != "application/json":
                snippet = self._snippet(await _read(response, MAX_ERROR_BYTES))
                raise RequestFailure(
                    f"answered {kind or 'no content type'}, not events or JSON{snippet}"
                )
            async for chunk in response.aiter_raw():
                received += len(chunk)
                if received > max_bytes:
                    raise RequestFailure(
                        f"the answer is larger than {max_bytes / 2**20:.1f} MiB, far more than "
                        "its tokens need"
                    )
                rest += chunk
                if is_events:
                    *lines, rest = rest.split(b"\n")
                    for line in lines:
                        event = self._event(line)
                        if event is not None:
                            take(event)
            event = self._event(rest) if is_events else self._object(rest)
            if event is not None:
                take(event)

    async def get(self, url: str, max_bytes: int = 1 << 22) -> bytes:
        """The body of a GET. Raises RequestFailure."""
        async with self._sent("GET", url, None) as response:
            return await _read(response, max_bytes)

    async def get_object(self, url: str) -> Event | None:
        """The JSON object at ``url``; None where there is none."""
        try:
            return self._object(await self.get(url))
        except RequestFailure as failure:
            if failure.is_unreachable:
                raise
            return None

    async def post_object(self, url: str, body: Mapping[str, Any]) -> Event | None:
        """The JSON object that answers ``body``; None where there is none."""
        try:
            async with self._sent("POST", url, body) as response:
                return self._object(await _read(response, 1 << 22))
        except RequestFailure as failure:
            if failure.is_unreachable:
                raise
            return None

    @asynccontextmanager
    async def _sent(
        self, method: str, url: str, body: Mapping[str, Any] | None
    ) -> AsyncIterator[Any]:
        """The open response to a request; its status is 2xx."""
        client = self._idle.pop() if self._idle else self._make_client()
        request = client.build_request(method, url, json=body)
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await client.send(request, stream=True)
                try:
                    await self._refuse(response)
                    yield response
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise RequestFailure(
                f"no whole answer within {self._timeout_s:g} s (--timeout)"
            ) from error
        except (self._httpx.ConnectError, self._httpx.ConnectTimeout) as error:
            raise RequestFailure(
                f"cannot connect to {self.root}: {self._why(error)}",
                is_temporary=True,
                is_unreachable=True,
            ) from error
        except self._httpx.TimeoutException as error:
            raise RequestFailure(
                f"nothing arrived for {time.perf_counter() - started:.0f} s: {self._why(error)}"
            ) from error
        except (self._httpx.HTTPError, self._httpx.InvalidURL, OSError) as error:
            raise RequestFailure(
                f"the connection broke: {self._why(error)}", is_temporary=True
            ) from error
        finally:
            self._idle.append(client)

    async def _refuse(self, response: Any) -> None:
        status = response.status_code
        if 300 <= status < 400:
            target = response.headers.get("location", "nowhere")
            raise RequestFailure(
                f"HTTP {status}: redirects to {self.redact(target)[:MAX_SNIPPET]!r}, which is not "
                "followed: give the final address as --endpoint",
                status=status,
            )
        if status >= 400:
            try:
                content = await _read(response, MAX_ERROR_BYTES)
            except RequestFailure:
                content = b""
            raise RequestFailure(
                f"HTTP {status}{self._snippet(content)}",
                status=status,
                is_temporary=status in TEMPORARY,
                retry_after_s=_seconds(response.headers.get("retry-after")),
            )
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise RequestFailure(f"the answer is {encoding[:40]!r} encoded, which was not accepted")

    def _event(self, line: bytes) -> Event | None:
        """The object on a ``data:`` line; None for every other line of the protocol."""
        line = line.strip()
        if not line.startswith(b"data:"):
            return None
        data = line[5:].strip()
        return None if data == b"[DONE]" or not data else self._object(data)

    def _object(self, content: bytes) -> Event:
        try:
            value = json.loads(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RequestFailure(f"the answer is not valid UTF-8: {error.reason}") from error
        except (ValueError, RecursionError) as error:
            raise RequestFailure(f"the answer is not valid JSON{self._snippet(content)}") from error
        if not isinstance(value, dict):
            raise RequestFailure(f"the answer is not a JSON object{self._snippet(content)}")
        if value.get("error") is not None:
            raise RequestFailure(f"the server says{self._snippet(content)}")
        return value

    def _snippet(self, content: bytes) -> str:
        """The server's own words, if any, after a colon."""
        text = content.decode("utf-8", "replace")
        try:
            value = json.loads(text)
            error = value.get("error", value.get("detail", value.get("message")))
            text = str(error.get("message", error) if isinstance(error, dict) else error or text)
        except (ValueError, AttributeError, RecursionError):
            pass
        text = " ".join(self.redact(text).split())
        return f": {text[:MAX_SNIPPET]}" if text else ""

    def _why(self, error: BaseException) -> str:
        return self.redact(str(error)) or type(error).__name__


async def _read(response: Any, max_bytes: int) -> bytes:
    content = b""
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > max_bytes:
            raise RequestFailure(f"the answer is larger than {max_bytes / 2**20:.1f} MiB")
    return content


def _seconds(retry_after: str | None) -> float | None:
    try:
        return max(0.0, float(retry_after or ""))
    except ValueError:
        return None
