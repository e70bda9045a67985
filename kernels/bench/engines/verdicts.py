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
BITS = {
    "copies": ("copies",),
    "needle": ("needle", "needle_logprobs"),
    "long_s": ("long_s",),
}
"""What must not differ in ours; the control is that any of it differs in stock."""
MOST = {"step_ms": 1.02, "requests_s": 1.03, "prefill_s": 1.03, "long_s": 1.03}
MOST_EXPERTS = 1.10
MOST_ON_RANKS = {**MOST, "step_ms": 1.05}
"""At most so many times stock's: of a dense model, a mixture of experts, on several GPUs."""
LEAST = {"closed_tokens_per_s": 1 / 1.03}
MOST_LATENCY = 1.03
"""Of the closed loop's p50 and p99."""
UNCHANGED = {"stock": ("stock-asked",), "vllm": ("unset", "uninstalled", "unknown-version")}
"""Modes in which the plug-in must not act, by the one that they must have every bit of."""
REFUSALS = {"uncovered-layer": "mixer", "dead-override": "never came to its ops"}
"""What the refusal of a planted fault must say."""
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
        found += _unchanged(model, mine) + _refusals(model, mine)
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
    def middle(mode: str, measure: str, batch: str, column: str = "value") -> float | None:
        """The median over turns; a load's first run, which warms up, is left out."""
        values = [
            float(row[column])
            for row in _of(rows, mode, measure)
            if row["batch"] == batch and row["nth"] in ("", "1")
        ]
        return statistics.median(values) if values else None

    limits = [
        (measure, "value", MOST_EXPERTS if model in EXPERTS else m) for measure, m in most.items()
    ]
    limits += [(measure, column, MOST_LATENCY) for measure in LEAST for column in ("p50", "p99")]
    limits += [(measure, "value", None) for measure in LEAST]
    found = []
    for measure, column, limit in limits:
        for batch in dict.fromkeys(row["batch"] for row in _of(rows, OURS, measure)):
            ours, stock = (middle(mode, measure, batch, column) for mode in (OURS, STOCK))
            if ours is None:
                continue
            name = measure if column == "value" else f"{measure}'s {column}"
            text = f"{model} {name} at {batch}: {ours:.4g}"
            if stock is None:
                found.append(Verdict("untested", f"{text}, without stock's"))
                continue
            ratio = ours / stock
            is_met = ratio >= LEAST[measure] if limit is None else ratio <= limit
            text += f", stock {stock:.4g}: {ratio:.3f}"
            found.append(Verdict("met" if is_met else "missed", text))
    return found


def _unchanged(model: str, rows: list[Row]) -> list[Verdict]:
    """Bits of modes in which the plug-in must not act; the control is that ours has others."""

    def digests(mode: str, acts: str) -> set[str]:
        return {row["value"] if row["n"] == acts else "" for row in _of(rows, mode, "digest")}

    found, ours = [], digests(OURS, "1")
    for base, modes in UNCHANGED.items():
        want = digests(base, "0")
        for mode in modes:
            got = digests(mode, "0")
            if not got or not want:
                continue
            text = f"{model} {mode}: the bits of {base} are {want}, its own {got}, ours {ours}"
            if got != want or "" in got:
                found.append(Verdict("missed", text))
            else:
                is_shown = bool(ours) and ours != want
                found.append(Verdict("met" if is_shown else "untested", text))
    return found


def _refusals(model: str, rows: list[Row]) -> list[Verdict]:
    found = []
    for mode, said in REFUSALS.items():
        texts = [row["value"] for row in _of(rows, mode, "refusal")]
        if texts:
            is_met = texts[0].startswith("CoverageError") and said in texts[0]
            found.append(Verdict("met" if is_met else "missed", f"{model} {mode}: {texts[0]}"))
        elif _of(rows, mode, "start_s"):
            found.append(Verdict("missed", f"{model} {mode}: it started"))
    return found


def exit_code(found: Iterable[Verdict]) -> int:
    """As ndcheck's: 1 where a goal is missed, else 3 where one was not put to the test."""
    states = {verdict.state for verdict in found}
    return 1 if "missed" in states else 0 if states == {"met"} else 3
