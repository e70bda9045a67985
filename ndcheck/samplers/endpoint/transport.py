"""HTTP to one server: pooled, bounded in size and time, every failure one clear line."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ndcheck.errors import UsageError
from ndcheck.samplers.endpoint.answers.event_stream import (
    MAX_SNIPPET,
    TEMPORARY,
    Event,
    EventReader,
    RequestFailure,
    parse_object,
    snippet,
)
from ndcheck.samplers.endpoint.redaction import Redactor, without_credentials

CONNECT_TIMEOUT_S = 10.0
LOOKUP_TIMEOUT_S = 10.0
"""For pages that only say who the server is: nothing waits longer for them."""
LINGER_S = 1.0
"""Some servers keep the connection open after the last event: so long is its end waited for."""
MAX_ERROR_BYTES = 1 << 16
MAX_PAGE_BYTES = 1 << 22
ENCODINGS = frozenset({"identity", "", "gzip", "x-gzip", "deflate"})


@dataclass(frozen=True, slots=True)
class Receipt:
    """How an answer ended and what it came through.

    ``is_whole``: the server said that it sent all. ``stray``: words that were no part of it.
    ``is_cached``: its headers say that a cache had it.
    """

    is_whole: bool
    stray: str
    connection: str
    is_cached: bool


class Transport:
    """Connections to the server at ``url``, an OpenAI base such as ``.../v1``: as many as in use.

    Each is a client of its own, since a pool looks through all its connections at every request.
    Every POST opens a connection and closes it: a balancer may choose the replica for each
    connection, so that requests over an old one are no new draw, or by a cookie: none is kept.
    In an `AnyAddressLoop` the name's address is drawn for each connection, too.
    Redirects are never followed: a key must not travel to another host. Secrets are cut out of
    everything that leaves here. Raises UsageError for settings that no connection can be made with.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        timeout_s: float,
        query: Mapping[str, str] | None = None,
        secrets: Iterable[str] = (),
    ) -> None:
        """``query`` goes into every address; ``secrets`` are those that requests hold."""
        import httpx2

        self._httpx = httpx2
        self.base = url.rstrip("/")
        self.root = self.base.removesuffix("/v1")
        self.redactor = Redactor({**headers, **{f"secret {s}": s for s in secrets}})
        self._query = query or None
        self._headers = {**headers, "accept-encoding": "identity"}
        self._timeout_s = timeout_s
        self._tls = self._make_tls()
        self._names = (f"{uuid.uuid4().hex[:8]}-{n}" for n in itertools.count(1))
        self._idle: dict[str, list[Any]] = {"GET": [], "POST": []}
        try:
            httpx2.URL(self.base)
        except (httpx2.InvalidURL, ValueError) as error:
            raise UsageError(f"--endpoint: {error}") from None
        self._idle["GET"].append(self._make_client())

    def _make_tls(self) -> Any:
        try:
            return self._httpx.create_ssl_context()
        except (OSError, ValueError) as error:
            named = [n for n in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(n)]
            log = os.environ.get("SSLKEYLOGFILE")
            if log and not os.access(Path(log).parent, os.W_OK):
                named = ["SSLKEYLOGFILE"]
            where = f"{named[0]}={os.environ[named[0]]}" if named else "TLS"
            reason = getattr(error, "strerror", None) or str(error)
            if isinstance(error, ssl.SSLError):
                reason = "it holds no certificate"
            raise UsageError(f"{where}: {reason}") from None

    async def close(self) -> None:
        for client in (*self._idle["GET"], *self._idle["POST"]):
            with contextlib.suppress(Exception):
                await client.aclose()

    def _make_client(self) -> Any:
        try:
            return self._httpx.AsyncClient(
                verify=self._tls,
                headers=self._headers,
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
                timeout=self._httpx.Timeout(self._timeout_s, connect=CONNECT_TIMEOUT_S),
                follow_redirects=False,
            )
        except (self._httpx.InvalidURL, ValueError, ImportError) as error:
            names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
            found = [n for name in names for n in (name, name.lower()) if os.environ.get(n)]
            raise UsageError(
                f"the proxy settings in {', '.join(found)} cannot be used: {self._why(error)}"
            ) from None

    async def stream(
        self,
        url: str,
        body: Mapping[str, Any],
        max_bytes: int,
        take: Callable[[Event, float], None],
    ) -> Receipt:
        """POST ``body`` and ``take`` each JSON object of the answer, and when it came.

        Raises RequestFailure for everything that is not one of these.
        """
        received, at_s = 0, time.perf_counter()
        loop, has_waited = asyncio.get_running_loop(), asyncio.Event()
        has_waited.set()
        async with self._sent("POST", url, body, self._timeout_s) as (response, connection):
            reader = EventReader(self.redactor, response.headers.get("content-type", ""))
            try:
                async with asyncio.timeout(None) as patience:
                    async for chunk in response.aiter_bytes():
                        if has_waited.is_set():  # Else it lay ready beside the one before.
                            at_s = time.perf_counter()
                            has_waited.clear()
                            loop.call_soon(has_waited.set)
                        received += len(chunk)
                        if received > max_bytes:
                            raise RequestFailure(
                                f"the answer is larger than {max_bytes / 2**20:.1f} MiB, far more "
                                "than its tokens need"
                            )
                        for event in reader.feed(chunk):
                            take(event, at_s)
                        if reader.is_whole:
                            patience.reschedule(loop.time() + LINGER_S)
            except TimeoutError:
                if not reader.is_whole:
                    raise
            for event in reader.finish():
                take(event, at_s)
        words = snippet(reader.stray, self.redactor)
        return Receipt(reader.is_whole, words, connection, _is_cached(response.headers))

    async def get(self, url: str) -> bytes:
        """The body of a GET. Raises RequestFailure."""
        timeout_s = min(self._timeout_s, LOOKUP_TIMEOUT_S)
        async with self._sent("GET", url, None, timeout_s) as (response, _):
            return await _read(response, MAX_PAGE_BYTES)

    async def get_object(self, url: str) -> Event:
        """The JSON object at ``url``; empty where there is none."""
        try:
            return parse_object(await self.get(url), self.redactor)
        except RequestFailure as failure:
            if failure.is_unreachable:
                raise
            return {}

    @asynccontextmanager
    async def _sent(
        self, method: str, url: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> AsyncIterator[tuple[Any, str]]:
        """The open response to a request, with a status of 2xx, and its connection's name."""
        idle = self._idle[method]
        client = idle.pop() if idle else self._make_client()
        name = next(self._names) if method == "POST" else ""
        headers = {"connection": "close"} if method == "POST" else {}
        started = time.perf_counter()
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    request = client.build_request(
                        method, url, params=self._query, json=body, headers=headers
                    )
                    response = await client.send(request, stream=True)
                except (ValueError, self._httpx.InvalidURL) as error:
                    raise RequestFailure(f"{method} {url}: {self._why(error)}") from None
                try:
                    await self._refuse(response)
                    yield response, name
                finally:
                    await response.aclose()
        except TimeoutError:
            raise RequestFailure(f"no whole answer within {timeout_s:g} s (--timeout)") from None
        except (self._httpx.ConnectError, self._httpx.ConnectTimeout) as error:
            raise RequestFailure(
                f"cannot connect to {self.root}{_proxy(self.root)}: {self._why(error)}",
                is_temporary=True,
                is_unreachable=True,
            ) from None
        except self._httpx.DecodingError as error:
            raise RequestFailure(
                f"the answer is not encoded as its headers say: {self._why(error)}"
            ) from None
        except self._httpx.TimeoutException as error:
            raise RequestFailure(
                f"nothing arrived for {time.perf_counter() - started:.0f} s: {self._why(error)}"
            ) from None
        except (self._httpx.HTTPError, self._httpx.StreamError, OSError) as error:
            raise RequestFailure(
                f"the connection broke{_proxy(self.root)}: {self._why(error)}", is_temporary=True
            ) from None
        finally:
            idle.append(client)

    async def _refuse(self, response: Any) -> None:
        status = response.status_code
        if 300 <= status < 400:
            # Without its query, which may be signed.
            target = response.headers.get("location", "nowhere").partition("?")[0]
            target = without_credentials(self.redactor.redact(target))
            raise RequestFailure(
                f"HTTP {status}: redirects to {target[:MAX_SNIPPET]!r}, which is not "
                "followed: give the final address as --endpoint",
                status=status,
            )
        if status >= 400:
            try:
                content = await _read(response, MAX_ERROR_BYTES)
            except RequestFailure:
                content = b""
            raise RequestFailure(
                f"HTTP {status}{snippet(content, self.redactor)}",
                status=status,
                is_temporary=status in TEMPORARY,
                retry_after_s=_seconds(response.headers.get("retry-after")),
            )
        encoding = response.headers.get("content-encoding", "").lower()
        if encoding not in ENCODINGS:
            encoding = self.redactor.redact(encoding)[:40]
            raise RequestFailure(f"the answer is {encoding!r} encoded, which was not accepted")

    def _why(self, error: BaseException) -> str:
        words = without_credentials(self.redactor.redact(str(error)), "[user:password]@")
        why = " ".join(words.split())[:MAX_SNIPPET] or type(error).__name__
        if "WRONG_VERSION_NUMBER" in why:  # OpenSSL's words for an answer that is no TLS.
            why += " (where the server speaks plain HTTP, give http://)"
        elif "CERTIFICATE_VERIFY_FAILED" in why:
            why += " (where you trust its authority, give SSL_CERT_FILE=AUTHORITY.pem)"
        return why


async def _read(response: Any, max_bytes: int) -> bytes:
    content = b""
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > max_bytes:
            raise RequestFailure(f"the answer is larger than {max_bytes / 2**20:.1f} MiB")
    return content


def _is_cached(headers: Mapping[str, str]) -> bool:
    """By RFC 9111's Age, RFC 9211's Cache-Status or what gateways have instead.

    A cached prefix of a prompt is no cached answer.
    """
    if re.fullmatch(r"0*[1-9]\d*", headers.get("age", "")):
        return True
    return any(
        "cache" in name and not _OF_PROMPTS.search(name) and _HIT.search(f"{name}={value}")
        for name, value in headers.items()
    )


_OF_PROMPTS = re.compile("prompt|prefix|token|kv")
_HIT = re.compile(
    r"=(?:[^=]*[\s;,_]|refresh)?hit\b|^[^=]+=(?:stale|revalidated|updating)\b|"
    r"hits?=(?:true|yes|(?:0, *)*[1-9])",
    re.IGNORECASE,
)


def _proxy(url: str) -> str:
    """Which setting sends requests for ``url`` through a proxy, if any does."""
    parts, proxies = urlsplit(url), getproxies()
    name = next((name for name in (parts.scheme, "all") if proxies.get(name)), None)
    if name is None or proxy_bypass(parts.hostname or ""):
        return ""
    return f" through the proxy of {name.upper()}_PROXY"


def _seconds(retry_after: str | None) -> float | None:
    """``Retry-After`` in seconds from now: it is a number or a date."""
    try:
        return max(0.0, float(retry_after or ""))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(retry_after or "")
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
