"""A file of prompts in the forms that people keep them in, told apart by content and suffix."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ndcheck.errors import UsageError
from ndcheck.plan.prompts.entries import Entry, is_conversation, read_entry
from ndcheck.plan.prompts.tables import Row, is_table, read_csv, read_parquet
from ndcheck.storage.reading import MAX_DOCUMENT_BYTES, open_file, parse_json

STANDARD_INPUT = "-"
JSON_SUFFIXES, TABLE_SUFFIXES = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv")
SUFFIXES = (".txt", *JSON_SUFFIXES, *TABLE_SUFFIXES, ".parquet", "")
_JSON_START = re.compile(r"""[\[{]$|[\[\s]*\{\s*"[^"]*"\s*:""")
BYTE_ORDER_MARK = "\ufeff"
PARQUET = b"PAR1"
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


def read_prompts(file: Path, column: str | None = None) -> list[Entry]:
    """Each prompt with its id, None where it has none; ``-`` is standard input.

    A text file holds one prompt a line. Entries of JSON and rows of tables are read by
    `read_entry`; ``column`` names the field that holds the prompt. Raises UsageError naming the
    first line that is not understood, and what is accepted.
    """
    name = f"--prompts-file {file}"
    if str(file).startswith("hf:/"):
        raise UsageError(f"{name}: get it first: hf download --repo-type dataset OWNER/NAME FILE")
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{name}: give one prompt a line in a .txt file, or a file with the suffix "
            f"{', '.join(SUFFIXES[1:-1])}"
        )
    try:
        return _read(file, column)
    except OSError as error:
        is_stream = str(error.strerror).startswith(("it is a pipe", "it is a device"))
        hint = f": give it on standard input, as {STANDARD_INPUT}" if is_stream else ""
        raise UsageError(f"{name}: {error.strerror}{hint}") from error
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error


def typed_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """Prompts as a command line gives them, where ``-`` is all of standard input.

    Raises UsageError where it is to be read twice, here or as ``file``, or is no text.
    """
    if [*prompts, str(file)].count(STANDARD_INPUT) > 1:
        raise UsageError(f"--prompt, --prompts-file: {STANDARD_INPUT} can be read once only")
    return [_read_prompt() if prompt == STANDARD_INPUT else prompt for prompt in prompts]


def _read_prompt() -> str:
    try:
        text = _read_standard_input().decode("utf-8")
    except ValueError as error:
        raise UsageError(f"--prompt {STANDARD_INPUT}: {error}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _read_standard_input() -> bytes:
    return _bounded(sys.stdin.buffer.read(MAX_DOCUMENT_BYTES + 1))


def _read(file: Path, column: str | None) -> list[Entry]:
    if str(file) == STANDARD_INPUT:
        content = _read_standard_input()
    else:
        with open_file(file) as opened:
            content = _bounded(opened.read(MAX_DOCUMENT_BYTES + 1))
    suffix = file.suffix.lower()
    if content.startswith(PARQUET):
        return _read_entries(read_parquet(content, column), column)
    if suffix == ".parquet":
        raise ValueError("it is no Parquet file")
    for magic, kind in PACKED.items():
        if content.startswith(magic):
            raise ValueError(f"it is packed ({kind}): unpack it first")
    text = _decode(content)
    if suffix in TABLE_SUFFIXES:
        return _read_entries(read_csv(text, column), column)
    if suffix in JSON_SUFFIXES:
        return _read_entries(_json_values(text), column)
    if _is_json(text):
        if suffix == "":
            return _read_entries(_json_values(text), column)
        raise ValueError(
            "it holds JSON: name it .jsonl or .json; prompts that are JSON themselves are strings "
            "there"
        )
    if is_table(text, column):
        if suffix == "":
            return _read_entries(read_csv(text, column), column)
        raise ValueError("its first line names columns: name it .csv or .tsv")
    if column is not None:
        raise ValueError("--prompt-column is for JSON, CSV and Parquet: this is text")
    return [Entry(None, _checked(line, number)) for number, line in _lines(text)]


def _decode(content: bytes) -> str:
    """Raises ValueError with the first line that is no text."""
    try:
        text = content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line}: it is no UTF-8 ({error.reason}): save it in that encoding"
        ) from error
    before, nul, _ = text.partition("\0")
    if nul:
        line = before.count("\n") + 1
        raise ValueError(f"line {line}: it holds a NUL character: give text, encoded as UTF-8")
    return text


def _checked(line: str, number: int) -> str:
    if "\r" in line:
        raise ValueError(
            f"line {number}: it holds a carriage return: end lines with a line feed, or give JSON"
        )
    if line.startswith(BYTE_ORDER_MARK):
        raise ValueError(f"line {number}: it begins with a byte order mark: files joined into one?")
    return line


def _bounded(content: bytes) -> bytes:
    if len(content) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"it is larger than {MAX_DOCUMENT_BYTES >> 20} MiB")
    return content


def _read_entries(rows: Iterator[Row], column: str | None) -> list[Entry]:
    entries = []
    for place, value in rows:
        try:
            entries.append(read_entry(value, column))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return entries


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, by number."""
    # Not splitlines(), which also cuts at characters that JSON holds as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _is_json(text: str) -> bool:
    """Does it begin as JSON of prompts does, whole or broken?

    Prompts that only begin with a bracket are text.
    """
    first = next(_lines(text), (0, ""))[1].strip()
    if first[:1] not in ("{", "["):
        return False
    return bool(_JSON_START.match(first)) or isinstance(_try_json(text), dict | list)


def _try_json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _json_values(text: str) -> Iterator[Row]:
    """The entries of JSON lines or of one document, each with its place."""
    lines = _lines(text)
    first = next(lines, None)
    if first is None:
        return
    if next(lines, None) is None or _try_json(first[1]) is None:
        # One line is a document too; one that begins on a line of its own is no JSON lines.
        document = _try_json(text)
        if isinstance(document, list) and not is_conversation(document):
            yield from ((f"entry {i}", value) for i, value in enumerate(document, 1))
            return
        if document is not None:
            yield f"line {first[0]}", document
            return
        if first[1].lstrip().startswith("[") or first[1].strip() == "{":
            _parse(text, "")
    for number, line in _lines(text):
        yield f"line {number}", _parse(line, f"line {number}: ")


def _parse(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        place = place or f"line {error.lineno}: "
        what = error.msg.removesuffix(" at")
        raise ValueError(f"{place}{what} at character {error.colno}") from error
    except ValueError as error:
        raise ValueError(f"{place}{error}") from error
