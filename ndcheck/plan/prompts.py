"""A file of prompts: one a line, or as JSON lines."""

from __future__ import annotations

from pathlib import Path

from ndcheck.errors import UsageError
from ndcheck.storage.reading import is_unicode, parse_json, read_text

ACCEPTED = (".txt", ".jsonl", "")
BYTE_ORDER_MARK = "\ufeff"


def read_prompts(file: Path) -> list[tuple[str | None, str]]:
    """Each prompt with its id, None where it has none. Raises UsageError naming the line."""
    if file.suffix not in ACCEPTED:
        raise UsageError(
            f"--prompts-file {file}: give one prompt a line in a .txt file, or JSON lines in a "
            ".jsonl file"
        )
    try:
        text = read_text(file).removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        raise UsageError(f"--prompts-file {file}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--prompts-file {file}: {error}") from error
    # Not splitlines(), which also cuts at characters that JSON holds as they are.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if file.suffix != ".jsonl":
        return [(None, line) for line in lines if line.strip()]
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entries.append(_read_entry(line))
            except ValueError as error:
                raise UsageError(f"--prompts-file {file} line {number}: {error}") from error
    return entries


def _read_entry(line: str) -> tuple[str | None, str]:
    value = parse_json(line)
    fields = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise ValueError('give a string or {"prompt": "..."}')
    name = fields.get("id")
    if name is None:
        return None, fields["prompt"]
    if type(name) not in (str, int) or not is_unicode(str(name)):
        raise ValueError("id: give a text or a whole number")
    return str(name), fields["prompt"]
