"""A recording against its scores: the screen, the JSON document, and a table of every token."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ndcheck.judging.verdict import Verdict, worst
from ndcheck.reports.terminal import print_verdict, print_without_padding
from ndcheck.reports.untrusted import visible
from ndcheck.scoring.comparing import CLIP, PERCENTILES, Comparison
from ndcheck.scoring.completions import Recording
from ndcheck.scoring.scorers import Scored
from ndcheck.storage.scores import Control

SCHEMA_VERSION = 1
MOST_BINS = 8
CONTROLS: dict[Control, str] = {
    "caught": "caught: another token in its place got another log-probability",
    "missed": "MISSED: another token in its place got the same log-probability",
    "absent": "none: the file does not hold the control that --requests writes",
}
COLUMNS = (
    *("arm", "completion", "index", "token_id", "recorded_logprob", "scored_logprob"),
    *("difference", "differs", "importance_ratio", "recorded_rank", "scored_rank"),
)

Judged = Sequence[tuple[Comparison, Verdict]]


def print_score(console: Console, recording: Recording, scored: Scored, judged: Judged) -> None:
    """Verdicts first, then what was compared, the figures of each arm, and those by position."""
    for comparison, verdict in judged:
        print_verdict(console, verdict, comparison.arm or "")
    console.print()
    for name, words in (
        ("recorded", recording.source),
        ("scored by", scored.title),
        ("control", CONTROLS[scored.control]),
    ):
        console.print(Text(_hanging(f"{name:<9}  ", visible(words), console.width)), soft_wrap=True)
    console.print()
    print_without_padding(console, _figures([comparison for comparison, _ in judged]))
    for comparison, _ in judged:
        if comparison.n_differ:
            console.print()
            print_without_padding(console, _by_position(comparison))


def _hanging(name: str, words: str, width: int) -> str:
    """Lines of whole words, so that a path can be taken from the screen."""
    return textwrap.fill(
        words,
        width,
        initial_indent=name,
        subsequent_indent=" " * len(name),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _name(comparison: Comparison) -> str:
    return comparison.arm or "tokens"


def _figures(comparisons: Sequence[Comparison]) -> Table:
    table = _table("", *map(_name, comparisons))
    columns = [list(_rows(comparison)) for comparison in comparisons]
    for cells in zip(*columns, strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    return table


def _rows(found: Comparison) -> Iterator[tuple[str, str]]:
    n = found.n_tokens
    yield "completions", f"{len(found.completions)}, {found.n_distinct} distinct"
    yield "bits equal", _share(n - found.n_differ, n)
    yield "first that differs", _token(found.first_difference)
    yield "max difference, nats", _number(found.max_difference)
    yield "mean difference, nats", _number(found.mean_difference)
    yield "KL k1, nats/token", _number(found.k1_kl)
    yield "KL k3, nats/token", _number(found.k3_kl)
    for percent, ratio in zip(PERCENTILES, found.ratio_percentiles, strict=False):
        yield f"ratio, percentile {percent}", _number(ratio, 4)
    yield f"ratio outside {CLIP[0]}-{CLIP[1]}", _share(found.n_outside_clip, n)
    ranked = found.n_ranked
    yield "other rank", _share(found.n_rank_changes, ranked) if ranked else "unknown"
    parted = f"{found.n_parted} of {len(found.completions)}"
    yield "greedy texts that part", parted if ranked else "unknown"
    yield "first of them at", _token(found.first_parting) if ranked else "unknown"


def _by_position(found: Comparison) -> Table:
    """Of tokens counted from 1, in a few bins."""
    at = found.by_position
    length = len(at.n)
    edges = np.unique(np.linspace(0, length, min(MOST_BINS, length) + 1).astype(int)).tolist()
    table = _table(f"{_name(found)}, token", "differ", "mean nats", "max nats")
    for start, end in pairwise(edges):
        n = int(at.n[start:end].sum())
        mean = float((at.mean_difference * at.n)[start:end].sum()) / n
        differ = f"{int(at.n_differ[start:end].sum())}/{n}"
        largest = _number(float(at.max_difference[start:end].max()))
        table.add_row(f"{start + 1}-{end}", differ, _number(mean), largest)
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for i, name in enumerate(names):
        # Where there is no room for both, names fold and numbers do not.
        is_number = i > 0
        table.add_column(
            name,
            justify="right" if is_number else "left",
            overflow="fold",
            no_wrap=is_number,
        )
    return table


def _share(n: int, n_all: int) -> str:
    return f"{n}/{n_all}" + (f" ({100 * n / n_all:.3g} %)" if n_all else "")


def _token(index: int | None) -> str:
    return "none" if index is None else f"token {index + 1}"


def _number(value: float | None, digits: int = 3) -> str:
    return "unknown" if value is None else f"{value + 0.0:.{digits}g}"


def score_document(
    recording: Recording, scored: Scored, judged: Judged, exit_code: int
) -> dict[str, Any]:
    """The ``--json`` document: indices count from 0, unknown is null, and numbers are finite."""
    outcomes = [verdict.outcome for _, verdict in judged]
    found: dict[str, Any] = _finite(
        {
            "schema_version": SCHEMA_VERSION,
            "exit_code": exit_code,
            "verdict": worst(outcomes),
            "recorded": recording.source,
            "scored_by": scored.title,
            "control": scored.control,
            "arms": [_arm(comparison, verdict) for comparison, verdict in judged],
        }
    )
    return found


def _arm(found: Comparison, verdict: Verdict) -> dict[str, Any]:
    fields = {
        name: getattr(found, name)
        for name in Comparison.__dataclass_fields__
        if name not in ("completions", "by_position", "ratio_percentiles")
    }
    at = found.by_position
    percentiles = zip(map(str, PERCENTILES), found.ratio_percentiles, strict=False)
    return {
        **fields,
        "verdict": verdict.outcome,
        "accepts_divergence": verdict.label == "ACCEPTED",
        "reasons": list(verdict.reasons),
        "n_completions": len(found.completions),
        "ratio_percentiles": dict(percentiles),
        "completions": [
            {
                "name": x.completion.name,
                "n_tokens": len(x.difference),
                "n_differ": int(x.differs.sum()),
                "first_difference": x.first_difference,
                "max_difference": float(np.abs(x.difference).max()),
                "parts_at": x.parts_at,
            }
            for x in found.completions
        ],
        "by_position": {name: getattr(at, name).tolist() for name in type(at).__dataclass_fields__},
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def token_lines(judged: Judged) -> Iterator[str]:
    """A CSV table with a row for each token; indices count from 0."""
    yield _csv(COLUMNS)
    for comparison, _ in judged:
        for x in comparison.completions:
            with np.errstate(over="ignore"):
                ratios = np.exp(x.difference)
            for i, token_id in enumerate(x.completion.token_ids):
                ranks = ("" if of is None else int(of[i]) for of in (x.completion.ranks, x.ranks))
                yield _csv(
                    (
                        *(comparison.arm or "", x.completion.name, i, token_id),
                        *(float(x.completion.logprobs[i]), float(x.scored[i])),
                        *(float(x.difference[i]), bool(x.differs[i]), float(ratios[i]), *ranks),
                    )
                )


def _csv(cells: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue()
