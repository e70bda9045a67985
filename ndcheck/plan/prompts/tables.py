"""Rows of CSV and Parquet files, as the fields of one entry each."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Iterator, Sequence
from typing import Any

from ndcheck.errors import UsageError
from ndcheck.plan.prompts.entries import FIELDS
from ndcheck.storage.reading import MAX_DOCUMENT_BYTES

Row = tuple[str, Any]
"""Where an entry is, and its fields."""

DELIMITERS = ",;\t"
ROWS_AT_A_TIME = 16
"""A row may be as large as the file."""
DEFAULT = "prompt"


def read_csv(text: str, column: str | None) -> Iterator[Row]:
    """Rows by the names in the first one. Raises ValueError, with the line where there is one."""
    header: list[str] = []
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
            raise ValueError(_no_column(column or DEFAULT, header))
        if len(set(header)) < len(header):
            raise ValueError("two of its columns have the same name")
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"line {line}: it has {len(cells)} cells, the first has {len(header)}"
                )
            if cells:
                yield f"line {line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
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
        if not {column, *FIELDS}.intersection(names):
            raise ValueError(_no_column(DEFAULT, names))
        number = n_bytes = 0
        for batch in file.iter_batches(ROWS_AT_A_TIME, columns=wanted):
            n_bytes += batch.nbytes
            if n_bytes > MAX_DOCUMENT_BYTES:
                raise ValueError(f"it holds more than {MAX_DOCUMENT_BYTES >> 20} MiB")
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"it cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _no_column(name: str, names: Sequence[str]) -> str:
    listed = ", ".join(names[:20]) or "none"
    return f"it has no column {name!r}, but {listed}: name one with --prompt-column"
