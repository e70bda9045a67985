"""From the bytes of an answer to its JSON objects, however a server frames them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ndcheck.errors import NdcheckError
from ndcheck.samplers.endpoint.redaction import Redactor

Event = dict[str, Any]
MAX_SNIPPET = 200
MAX_STRAY_BYTES = 1 << 16
TEMPORARY = frozenset({408, 429, 500, 502, 503, 504, 529})
_SPACE = b"\xef\xbb\xbf \t\r\n"
_SURROGATE = re.compile("[\ud800-\udfff]")
_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b"error:", b":")
_MESSAGES = ("message", "msg", "error_msg")
_WORDS = (
    *_MESSAGES,
    "detail",
    "details",
    "error",
    "errors",
    "reason",
    "description",
    "title",
)


class RequestFailure(NdcheckError):
    """One request failed.

    ``is_temporary``: the same request may succeed later. ``is_unreachable``: nothing accepts
    connections. ``retry_after_s`` is what the server asked for.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        is_temporary: bool = False,
        is_unreachable: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.is_temporary = is_temporary
        self.is_unreachable = is_unreachable
        self.retry_after_s = retry_after_s


class EventReader:
    """Takes an answer in chunks of any size and yields its JSON objects, without secrets.

    The content decides what it is, not its declared type: server-sent events (any line ends, with
    or without blank lines between them), one object a line, or one object. ``is_whole``: the
    server said that nothing follows, or sent one object. Raises RequestFailure for anything else,
    and for an error in any of the shapes that servers give it.
    """

    def __init__(self, redactor: Redactor, content_type: str) -> None:
        self._redactor = redactor
        self._type = content_type
        self._rest = bytearray()
        self._frames: str | None = None
        self._data: list[bytes] = []
        self._event = b""
        self._ends_in_return = False
        self.is_whole = False
        self.stray = b""
        """Lines that are no part of the protocol: often the words of what broke."""

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The objects that are complete now."""
        if not chunk:
            return
        if self._ends_in_return:
            chunk = chunk.removeprefix(b"\n")  # The rest of one line end: a second is an event's.
        self._ends_in_return = chunk.endswith(b"\r")
        has_line = b"\n" in chunk or b"\r" in chunk
        self._rest += chunk
        if self._frames is None:
            self._rest = self._rest.lstrip(_SPACE)  # Lines that keep a connection alive.
            self._frames = _find_frames(bytes(self._rest[:64]))
        if self._frames == "text" and len(self._rest) > MAX_STRAY_BYTES:
            raise self._no_answer()
        if self._frames in (None, "text", "object") or not has_line:
            return
        *lines, rest = re.split(rb"\r\n|\r|\n", bytes(self._rest))
        if self._frames == "unknown object":
            # An object a line, or one object on several lines: the first line tells.
            first = next((line for line in lines if line.strip(_SPACE)), None)
            if first is None:
                return
            self._frames = "lines" if _is_object(first) else "object"
            if self._frames == "object":
                return
        self._rest = bytearray(rest)
        for line in lines:
            yield from self._read_line(line)

    def finish(self) -> Iterator[Event]:
        """The objects that only the end of the answer completes."""
        if self.is_whole:
            return
        rest = bytes(self._rest)
        if self._frames in (None, "text"):
            raise self._no_answer()
        if self._frames in ("object", "unknown object"):
            yield self._object(rest)
            self.is_whole = True
            return
        yield from self._read_line(rest)
        yield from self._read_line(b"")

    def _read_line(self, line: bytes) -> Iterator[Event]:
        if self.is_whole:
            return
        line = line.strip(_SPACE)
        if not line:
            if self._data:
                data, self._data = b"\n".join(self._data), []
                yield self._object(data)
            self._event = b""
            return
        name, colon, value = line.partition(b":")
        if line.startswith(b"{") or not colon:
            name, value = (b"data", line) if line.startswith(b"{") else (b"", line)
        value = value.strip()
        if name == b"event":
            self._event = value.lower()
        elif name == b"error":
            raise self._refusal(value)
        elif name == b"data":
            yield from self._read_data(value)
        elif name not in (b"", b"id", b"retry") or not colon:
            self.stray = (self.stray + line + b" ")[:MAX_STRAY_BYTES]

    def _read_data(self, value: bytes) -> Iterator[Event]:
        if self._event == b"error":
            raise self._refusal(value)
        if not self._data and value.strip(b'"').upper() == b"[DONE]":
            self.is_whole = True
        elif value or self._data:
            self._data.append(value)
            # Most servers end an event with its line; only few need the blank line after it.
            if _is_object(data := b"\n".join(self._data)):
                self._data = []
                yield self._object(data)

    def _object(self, content: bytes) -> Event:
        return parse_object(content, self._redactor)

    def _refusal(self, value: bytes) -> RequestFailure:
        return RequestFailure(f"the server says{snippet(value, self._redactor)}")

    def _no_answer(self) -> RequestFailure:
        words = snippet(bytes(self._rest), self._redactor)
        kind = self._redactor.redact(self._type)[:MAX_SNIPPET] or "no content type"
        return RequestFailure(f"answered {kind}, not events or JSON{words}")


def _find_frames(head: bytes) -> str | None:
    """None while too little has arrived to tell."""
    if head.startswith(b"{"):
        return "unknown object"
    if head.startswith(b"["):
        return "object"
    if any(head.startswith(field) for field in _FIELDS):
        return "events"
    return None if any(field.startswith(head) for field in _FIELDS) else "text"


def _is_object(content: bytes) -> bool:
    content = content.strip(_SPACE)
    if not (content.startswith(b"{") and content.endswith(b"}")):
        return False
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def parse_object(content: bytes, redactor: Redactor) -> Event:
    """The JSON object, without secrets. Raises RequestFailure for another value or an error."""
    try:
        text = content.strip(_SPACE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestFailure(f"the answer is not valid UTF-8: {error.reason}") from None
    try:
        value = json.loads(text)
        if redactor.finds(text):
            value = redactor.redact_value(value)
    except (ValueError, RecursionError):
        raise RequestFailure(f"the answer is not valid JSON{snippet(content, redactor)}") from None
    if not isinstance(value, dict):
        raise RequestFailure(f"the answer is not a JSON object{snippet(content, redactor)}")
    if _is_error(value):
        code = find_code(value)
        raise RequestFailure(
            f"the server says{snippet(content, redactor)}",
            status=code,
            is_temporary=code in TEMPORARY,
        )
    return value


def _is_error(event: Event) -> bool:
    if event.get("error") or event.get("errors"):
        return True
    if event.get("choices") or "meta_info" in event:
        return False
    is_named = "error" in (event.get("object"), event.get("type"), event.get("status"))
    says = any(event.get(name) for name in _MESSAGES) and "id" not in event
    return is_named or says or bool(event.get("detail"))


def find_code(event: Event) -> int | None:
    """The HTTP status that an error names, if any."""
    error = event.get("error")
    for holder in (error if isinstance(error, dict) else {}, event):
        for name in ("code", "status", "status_code", "http_status"):
            code = holder.get(name)
            if isinstance(code, str) and code.isdecimal() and len(code) == 3:
                code = int(code)
            if type(code) is int and 400 <= code < 600:
                return code
    return None


def snippet(content: bytes, redactor: Redactor) -> str:
    """The server's own words, if any, after a colon."""
    text = content.decode("utf-8", "replace")
    try:
        value = json.loads(text)
        text = find_words(value) or text
    except (ValueError, RecursionError):
        pass
    text = " ".join(redactor.redact(plain(text)).split())
    return f": {text[:MAX_SNIPPET]}" if text else ""


def find_words(value: Any, depth: int = 4) -> str:
    """The sentence that an error holds, wherever its server puts it; empty if none is found."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "; ".join(filter(None, (find_words(item, depth - 1) for item in value[:4] if depth)))
    if isinstance(value, dict) and depth:
        held = (find_words(value[name], depth - 1) for name in _WORDS if value.get(name))
        words, field = next(filter(None, held), ""), _field(value)
        return words if field in words else f"{field}: {words}"
    return ""


def _field(error: Event) -> str:
    """What of the request an error is about, as OpenAI and pydantic name it; empty if neither."""
    place = error.get("loc")
    names = place[1:] if isinstance(place, list) else [error.get("param")]
    return ".".join(str(name) for name in names if isinstance(name, str | int))


def paired(text: str) -> str:
    """``text`` with the halves of surrogate pairs joined: events may bring them one by one."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def plain(text: str) -> str:
    """``text`` with lone surrogates replaced, so that it can be written."""
    return _SURROGATE.sub("\ufffd", paired(text))
