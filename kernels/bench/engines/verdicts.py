"""What the rows of `bench.engines.plugin` show: each goal met, missed, or not put to the test."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Row = Mapping[str, str]
OURS, STOCK = "ndcheck", "stock"
BITS = {"copies": ("copies",), "needle": ("needle", "needle_logprobs")}
"""What must not differ in ours; the control is that any of it differs in stock."""
MOST = {"step_ms": 1.02, "requests_s": 1.03, "prefill_s": 1.03, "long_s": 1.03}
MOST_EXPERTS = 1.10
MOST_ON_RANKS = {**MOST, "step_ms": 1.05}
"""At most so many times stock's: of a dense model, a mixture of experts, on several GPUs."""
LEAST = {"closed_tokens_per_s": 1 / 1.03}
EXPERTS = ("qwen3-30b-a3b",)


@dataclass(frozen=True, slots=True)
class Verdict:
    state: Literal["met", "missed", "untested"]
    text: str


def read_rows(out: Path, stage: str) -> list[Row]:
    """Of every engine of a stage."""
    rows: list[Row] = []
    for path in sorted(out.glob(f"{stage}-*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    return rows


def verdicts(rows: Iterable[Row], most: Mapping[str, float] = MOST) -> list[Verdict]:
    """Of each model and measure that ours was seen in, which takes at most ``most`` of stock's."""
    rows = list(rows)
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        found += [_bits(model, name, mine) for name in BITS if _of(mine, OURS, name)]
        found += _times(model, mine, most)
    return found


def _of(rows: Iterable[Row], mode: str, measure: str) -> list[Row]:
    return [row for row in rows if row["mode"] == mode and row["measure"] == measure]


def _bits(model: str, name: str, rows: list[Row]) -> Verdict:
    def differ(mode: str) -> int:
        return sum(int(row["differ"]) for each in BITS[name] for row in _of(rows, mode, each))

    ours, stock = differ(OURS), differ(STOCK)
    text = f"{model} {name}: {ours} differ, in stock {stock}"
    if ours:
        return Verdict("missed", text)
    if stock:
        return Verdict("met", text)
    return Verdict("untested", f"{text}: where stock does not differ either, nothing is shown")


def _times(model: str, rows: list[Row], most: Mapping[str, float]) -> list[Verdict]:
    def middle(mode: str, measure: str, batch: str) -> float | None:
        """The median over turns; a load's first run, which warms up, is left out."""
        values = [
            float(row["value"])
            for row in _of(rows, mode, measure)
            if row["batch"] == batch and row["nth"] in ("", "1")
        ]
        return statistics.median(values) if values else None

    found = []
    for measure in (*most, *LEAST):
        for batch in dict.fromkeys(row["batch"] for row in _of(rows, OURS, measure)):
            ours, stock = (middle(mode, measure, batch) for mode in (OURS, STOCK))
            if ours is None:
                continue
            text = f"{model} {measure} at {batch}: {ours:.4g}"
            if stock is None:
                found.append(Verdict("untested", f"{text}, without stock's"))
                continue
            ratio = ours / stock
            if measure in LEAST:
                is_met = ratio >= LEAST[measure]
            else:
                is_met = ratio <= (MOST_EXPERTS if model in EXPERTS else most[measure])
            text += f", stock {stock:.4g}: {ratio:.3f}"
            found.append(Verdict("met" if is_met else "missed", text))
    return found


def exit_code(found: Iterable[Verdict]) -> int:
    """As ndcheck's: 1 where a goal is missed, else 3 where one was not put to the test."""
    states = {verdict.state for verdict in found}
    return 1 if "missed" in states else 0 if states == {"met"} else 3
