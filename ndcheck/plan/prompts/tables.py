"""Rows of CSV and Parquet files, as the fields of one entry each."""

from __future__ import annotations

import csv
import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ndcheck.errors import UsageError
from ndcheck.plan.prompts.entries import FIELDS, HOLDERS
from ndcheck.storage.reading import MAX_DOCUMENT_BYTES, parse_json

Row = tuple[str, Any]
"""Where an entry is, and its fields."""

DELIMITERS = ",;\t"
ROWS_AT_A_TIME = 16
"""A row may be as large as the file."""
DEFAULT = "prompt"
TWICE = "two of its columns have the same name"
UNCLOSED = "unexpected end of data"
"""What the csv module says of a quoted cell that the end of the file ends."""
MAX_HEADER = 100_000
_CONVERSATION = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:""")


def is_table(text: str, column: str | None) -> bool:
    """Does its first line name the column of the prompts?"""
    header = re.split(r"[\r\n]", text[:MAX_HEADER], maxsplit=1)[0]
    rows = (next(csv.reader([header], delimiter=delimiter), []) for delimiter in DELIMITERS)
    return any((column or DEFAULT) in cells for cells in rows)


def read_csv(text: str, column: str | None) -> Iterator[Row]:
    """Rows by the names in the first one. Raises ValueError, with the line where there is one."""
    header: list[str] = []
    line = 1
    limit = csv.field_size_limit(MAX_DOCUMENT_BYTES)
    try:
        for delimiter in DELIMITERS:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            found = next(reader, [])
            header = header or found
            if (column or DEFAULT) in found:
                header = found
                break
        else:
            if header[:1] and header[0].lower().startswith("sep="):
                raise ValueError("line 1: leave out Excel's line that names the separator")
            raise ValueError(_no_column(column or DEFAULT, header))
        if len(set(header)) < len(header):
            raise ValueError(TWICE)
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"line {line}: it has {len(cells)} cells, the first has {len(header)}"
                )
            if cells:
                yield _row(f"line {line}", dict(zip(header, cells, strict=True)), column)
            line = reader.line_num + 1
    except csv.Error as error:
        if str(error) == UNCLOSED:
            raise ValueError(f"line {line}: a quotation mark opens that nothing closes") from error
        raise ValueError(f"line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def read_parquet(content: bytes, column: str | None) -> Iterator[Row]:
    """Rows with the columns that an entry is read for.

    Raises ValueError, also where they take more memory than a document may, and UsageError
    without pyarrow.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError("--prompts-file: Parquet needs pyarrow: pip install 'ndcheck[parquet]'")
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        names = file.schema_arrow.names
        wanted = [name for name in names if name == column or name in FIELDS]
        if column is not None and column not in names:
            raise ValueError(_no_column(column, names))
        if len(set(wanted)) < len(wanted):
            raise ValueError(TWICE)
        if not {column, *HOLDERS}.intersection(names):
            raise ValueError(_no_column(DEFAULT, names))
        number = n_bytes = 0
        for batch in file.iter_batches(ROWS_AT_A_TIME, columns=wanted):
            n_bytes += batch.nbytes
            if n_bytes > MAX_DOCUMENT_BYTES:
                raise ValueError(f"it holds more than {MAX_DOCUMENT_BYTES >> 20} MiB")
            for row in batch.to_pylist():
                number += 1
                yield _row(f"row {number}", row, column)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"it cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _row(place: str, fields: dict[str, Any], column: str | None) -> Row:
    """The fields with conversations that are kept as texts, as in CSV they must be."""
    for name in (column or DEFAULT, *HOLDERS):
        value = fields.get(name)
        if isinstance(value, str) and _CONVERSATION.match(value):
            try:
                fields[name] = parse_json(value)
            except ValueError as error:
                raise ValueError(f"{place}: {name}: a conversation that is no JSON") from error
    return place, fields


def _no_column(name: str, names: Sequence[str]) -> str:
    listed = ", ".join(names[:20]) or "none"
    return f"it has no column {name!r}, but {listed}: name one with --prompt-column"
