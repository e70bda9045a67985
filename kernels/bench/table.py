"""A CSV file that is written row by row, so that a run cut short still leaves its rows."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TextIO


class Table:
    def __init__(self, path: Path, *, echo: bool = True) -> None:
        self.file: TextIO = path.open("w", newline="", encoding="utf-8")
        self.writer: csv.DictWriter[str] | None = None
        self.echo = echo
        self.rows: list[dict[str, object]] = []

    def add(self, **row: object) -> None:
        if self.writer is None:
            self.writer = csv.DictWriter(self.file, fieldnames=list(row))
            self.writer.writeheader()
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(row)
        self.writer.writerow(rounded)
        self.file.flush()
        if self.echo:
            print(*rounded.values(), flush=True)
