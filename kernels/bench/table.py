"""A CSV file that is written row by row, so that a run cut short still leaves its rows."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path


class Table:
    def __init__(self, path: Path, *, echo: bool = True) -> None:
        self.path, self.echo = path, echo
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
        self.rows: list[dict[str, object]] = []

    def add(self, **row: object) -> None:
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list((self.rows or [row])[0]))
            if not self.rows:
                writer.writeheader()
            writer.writerow(rounded)
        self.rows.append(row)
        if self.echo:
            print(*rounded.values(), flush=True)


def rows_of(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def print_means(table: Table, columns: tuple[str, ...]) -> None:
    """The geometric mean and the least of columns of ratios, over all rows and those of few."""
    for column in columns:
        for name, most in (("all", math.inf), ("M <= 16", 16)):
            kept = (r for r in table.rows if r[column] and int(str(r["m"])) <= most)
            ratios = [float(str(r[column])) for r in kept]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                print(f"{column}, {name}: geometric mean {mean:.3f}, least {min(ratios):.3f}")


def add_ranked(table: Table, shape: str, m: int, us: Mapping[str, float], chosen: str) -> None:
    """Times of schedules, the fastest first, each beside that of the ``chosen`` one."""
    chosen_us = us.get(chosen, "")
    for config, each in sorted(us.items(), key=lambda item: item[1]):
        table.add(shape=shape, m=m, us=each, chosen_us=chosen_us, config=config)
    best = min(us, key=us.__getitem__)
    print(f"{shape} {m}: {us[best]:.2f} us {best}; shipped {chosen_us}", flush=True)
