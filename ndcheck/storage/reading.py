"""Files are input: bounded reading, strict JSON, and one `decode` into the records' own types."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import reprlib
import stat
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    BinaryIO,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from ndcheck.errors import UsageError
from ndcheck.storage.ranges import Range

MAX_DOCUMENT_BYTES = 64 * 2**20
MAX_LINE_BYTES = 32 * 2**20
MAX_FREE_DEPTH = 8
"""Of what is kept without a type of its own."""
INT64 = Range(-(2**63), 2**63 - 1)
NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

T = TypeVar("T")
Reader = Callable[[Any], Any]


def open_file(path: Path) -> BinaryIO:
    """Open a regular file to read bytes. Raises OSError, also for what would block or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"its name cannot be used: {error}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for is_kind, name in KINDS if is_kind(mode)), "no file")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file")
    return open(descriptor, "rb")  # noqa: PTH123 - a descriptor has no path


def exists(path: Path) -> bool:
    """Is there anything at ``path``? Raises UsageError where that cannot be told, saying why."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    return True


def read_text(path: Path) -> str:
    """All of a UTF-8 file, without the mark that some editors put before it.

    Raises OSError or ValueError, also where it is too large.
    """
    with open_file(path) as file:
        content = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"it is larger than {MAX_DOCUMENT_BYTES >> 20} MiB")
    return content.decode("utf-8-sig")


def read_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is longer than MAX_LINE_BYTES."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield None


FEW_OBJECTS = 100_000


@contextmanager
def uncollected() -> Iterator[None]:
    """For what makes a million objects and no cycles, as samples and modules: to look for some
    takes as long as to make them. What is done with them, and makes few, may be within as well.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            # To count what others have frozen takes 0.1 s where that is a million; few are searched
            # sooner.
            if gc.get_count()[0] > FEW_OBJECTS and not gc.get_freeze_count():
                # Counted as old, they are not all searched as soon as searching goes on.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def parse_json(text: str) -> Any:
    """JSON as RFC 8259 has it, each key once. Raises ValueError."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {_short(twice)} is there twice")
    return found


# `json.loads` would make one for each text.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_distinct)


def decode(record: type[T], document: Any, **given: Any) -> T:
    """A dataclass from parsed JSON, by the types that it declares.

    Absent fields take their defaults and unknown ones are ignored, so that earlier and later files
    are read alike. ``given`` are fields that the document holds in another form. Raises ValueError
    naming the field, what it holds and what is accepted.
    """
    if not isinstance(document, dict):
        raise ValueError(f"{_short(document)} is not accepted; give an object")
    for name, read, is_required in _fields(record):  # type: ignore[arg-type]
        if name in given:
            continue
        if name in document:
            try:
                given[name] = read(document[name])
            except ValueError as error:
                inner = str(error)
                joint = "." if getattr(error, "is_inner", False) else ": "
                raise _Inner(f"{name}{joint}{inner}") from None
        elif is_required:
            raise ValueError(f"no field '{name}'")
    return record(**given)


def refuse_unknown(document: Any, known: Any) -> None:
    """Raise ValueError for a key of ``document`` that ``known``, alike in form, does not have."""
    if isinstance(document, dict) and isinstance(known, dict):
        if unknown := document.keys() - known.keys():
            raise ValueError(f"there is no field {_short(min(unknown))}")
        document, known = ([values[name] for name in document] for values in (document, known))
    if isinstance(document, list) and isinstance(known, (list, tuple)):
        for inner, known_inner in zip(document, known, strict=True):
            refuse_unknown(inner, known_inner)


class _Inner(ValueError):
    """An error whose text begins with the name of a field."""

    is_inner = True


@cache
def _fields(record: type[Any]) -> tuple[tuple[str, Reader, bool], ...]:
    hints = get_type_hints(record, include_extras=True)
    return tuple(
        (
            field.name,
            _reader(hints[field.name]),
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(record)
    )


def _reader(kind: Any) -> Reader:
    """What turns a JSON value into ``kind``, or raises ValueError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, limits = arguments
        return _scalar(base, limits) if isinstance(limits, Range) else _raw_text
    if origin in (Union, types.UnionType):
        (inner,) = (_reader(each) for each in arguments if each is not type(None))
        return lambda value: None if value is None else inner(value)
    if origin is Literal:
        return _choice(arguments)
    if origin is tuple:
        return _sequence(arguments[0])
    if origin is dict:
        return _free_object
    if is_dataclass(kind):
        return lambda value: decode(kind, value)  # type: ignore[arg-type]
    return _scalar(kind, INT64 if kind is int else None)


def _scalar(kind: type, limits: Range | None) -> Reader:
    accepted = NAMES[kind] + (f" {limits}" if limits not in (None, INT64) else "")

    def read(value: Any) -> Any:
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        is_fine = type(value) is kind
        if is_fine and kind is float:
            is_fine = math.isfinite(value)
        if is_fine and kind is str:
            is_fine = is_unicode(value)
        if not is_fine or (limits is not None and value not in limits):
            raise ValueError(f"{_short(value)} is not accepted; give {accepted}")
        return value

    if kind is not int or limits is None:
        return read
    low, high = limits.low, limits.high
    # Most of what a file holds, and fine: nothing else need be asked.
    return lambda value: value if type(value) is int and low <= value <= high else read(value)


def _raw_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{_short(value)} is not accepted; give a text")
    return value


def is_unicode(text: str) -> bool:
    """Can the text be written as UTF-8? Half a character, a lone surrogate, cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _choice(accepted: tuple[Any, ...]) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is not str or value not in accepted:
            raise ValueError(f"{_short(value)} is not accepted; give {', '.join(accepted)}")
        return value

    return read


def _sequence(kind: Any) -> Reader:
    read_item = _reader(kind)
    (base, limits) = get_args(kind)[:2] if get_origin(kind) is Annotated else (kind, None)

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{_short(value)} is not accepted; give a list")
        # A completion has thousands of items: their types and range are looked at all at once.
        types = set(map(type, value))
        if kind == float | None and types == {float} and all(map(math.isfinite, value)):
            return tuple(value)
        if limits is not None and types == {base}:
            is_raw_text = not isinstance(limits, Range)
            if is_raw_text or (base is int and min(value) in limits and max(value) in limits):
                return tuple(value)
        return tuple(map(read_item, value))

    return read


def _free_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{_short(value)} is not accepted; give an object")
    _check_free(value, MAX_FREE_DEPTH)
    return value


def _check_free(value: Any, depth: int) -> None:
    """Refuse what could not be shown or written again."""
    if not depth:
        raise ValueError("it is nested too deeply")
    if isinstance(value, str) and not is_unicode(value):
        raise ValueError(f"{_short(value)} is not accepted; give a text")
    if isinstance(value, int) and value not in INT64:
        raise ValueError(f"{_short(value)} is not accepted; give a number of 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not accepted; give a finite number")
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    if isinstance(parts, list):
        for part in parts:
            _check_free(part, depth - 1)


def _short(value: Any) -> str:
    return ascii(value) if isinstance(value, (bool, float)) else reprlib.repr(value)
