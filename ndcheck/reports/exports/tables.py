"""The CSV exports, and the same as data frames; `columns` beside it says what they hold."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from ndcheck.analysis.summary import AxisFinding, LoadFinding, ProbeSummary
from ndcheck.findings import Findings
from ndcheck.records import Load
from ndcheck.reports.exports.columns import (
    COMPLETION_COLUMNS,
    FLOAT32,
    INT,
    LOAD_COLUMNS,
    PROPERTY_COLUMNS,
    SAMPLE_COLUMNS,
    SUMMARY_COLUMNS,
    TEXT,
    Columns,
)
from ndcheck.reports.untrusted import csv_text

if TYPE_CHECKING:
    import pandas as pd

ROWS_PER_TABLE = 20_000
"""Bounds the memory of a large export; the file is the same whatever the number."""

ROWS_AT_ONCE = 1024
"""Among so many rows of a column equal cells are looked at once."""

_Row = dict[str, Any]
"""A value for each column, by its name."""
_Cells = dict[str, list[Any]]
"""The values of each column, by its name."""

# Most cells of a large run are like many others.
_json = lru_cache(4096)(json.dumps)
_csv_text = lru_cache(4096)(csv_text)


def sample_tables(findings: Findings, rows: int = ROWS_PER_TABLE) -> Iterator[pd.DataFrame]:
    """samples.csv in tables of at most ``rows`` rows; controls are left out."""
    return _frames(SAMPLE_COLUMNS, _sample_cells(findings, rows))


def _sample_cells(findings: Findings, rows: int) -> Iterator[_Cells]:
    columns = findings.summary.samples
    found = zip(
        findings.samples,
        columns.completion_id.tolist(),
        columns.first_divergence.tolist(),
        columns.margin,  # iterated as float32: a float64 would print digits that were never there
        columns.latent_divergence.tolist(),
        columns.max_abs_dlogprob,
        strict=True,
    )
    shown = (row for row in found if row[0].purpose != "control")
    while chunk := list(islice(shown, rows)):
        samples, completion_id, first_divergence, margin, latent, dlogprob = zip(
            *chunk, strict=True
        )
        loads = [sample.load for sample in samples]
        lengths = [_lengths(load.filler_lengths) for load in loads]
        yield {
            "run_id": [findings.run.run_id] * len(samples),
            "arm": [s.arm for s in samples],
            "probe_id": [s.probe_id for s in samples],
            "trial_id": [s.trial_id for s in samples],
            "sample_id": [s.sample_id for s in samples],
            "batch_size": [load.batch_size for load in loads],
            "achieved_batch_size": [s.witness.achieved_batch_size for s in samples],
            "slot": [s.slot for s in samples],
            "filler_lengths": [text for text, _ in lengths],
            "cache_state": [load.cache_state for load in loads],
            "n_tokens": [None if s.error is not None else len(s.token_ids) for s in samples],
            "finish_reason": [s.finish_reason for s in samples],
            "completion_id": _known(completion_id),
            "first_divergence": _known(first_divergence),
            "margin": list(margin),
            "latent_divergence": _known(latent),
            "max_abs_dlogprob": list(dlogprob),
            "elapsed_s": [s.elapsed_s for s in samples],
            "error": [s.error for s in samples],
            "text": [None if s.error is not None else s.text for s in samples],
            "n_retries": [s.n_retries for s in samples],
            "axis": [s.purpose for s in samples],
            "baseline_trial_id": [s.baseline for s in samples],
            "first_divergence_from_1": [_from_1(at) for at in _known(first_divergence)],
            "first_latent_from_1": [_from_1(at) for at in _known(latent)],
            "filler_lengths_json": [as_json for _, as_json in lengths],
            "width": [_width(load) for load in loads],
            "fed_tokens": [s.fed and s.fed.n_tokens for s in samples],
            "fed_other_tokens": [s.fed and s.fed.n_other_tokens for s in samples],
            "fed_other_bits": [s.fed and s.fed.n_other_bits for s in samples],
            "draft_tokens": [_draft_tokens(load) for load in loads],
            "draft_proposed": [s.drafted and sum(s.drafted.proposed) for s in samples],
            "draft_accepted": [s.drafted and sum(s.drafted.accepted) for s in samples],
            "accepted_lengths_json": [s.drafted and _json(s.drafted.accepted) for s in samples],
        }


@lru_cache(4096)
def _lengths(lengths: tuple[int, ...]) -> tuple[str, str]:
    """With spaces between, and as JSON."""
    return " ".join(map(str, lengths)), json.dumps(lengths)


def _width(load: Load | LoadFinding) -> int | None:
    """None where the prompt is in the passes too."""
    return None if load.scores else load.width


def _draft_tokens(load: Load | LoadFinding) -> int | None:
    """How many tokens a draft proposes to a pass; None where there is none."""
    return load.width - 1 if load.drafts else None


def _known(numbers: Iterable[int]) -> list[int | None]:
    return [None if number < 0 else number for number in numbers]


def _from_1(position: int | None) -> int | None:
    return None if position is None else position + 1


def completion_tables(findings: Findings, rows: int = ROWS_PER_TABLE) -> Iterator[pd.DataFrame]:
    """completions.csv in tables of at most ``rows`` rows."""
    return _frames(COMPLETION_COLUMNS, _completion_cells(findings, rows))


def _completion_cells(findings: Findings, rows: int) -> Iterator[_Cells]:
    return _cells(
        COMPLETION_COLUMNS,
        (
            (
                item,
                {
                    **_whose(findings, probe),
                    "first_divergence_from_1": _from_1(item.first_divergence),
                    "answer": probe.answers and probe.answers.answers[item.completion_id - 1],
                },
            )
            for probe in findings.summary.probes
            for item in probe.completions
        ),
        rows,
    )


def loads_table(findings: Findings) -> pd.DataFrame:
    """loads.csv."""
    return _one_frame(LOAD_COLUMNS, _load_cells, findings)


def _load_cells(findings: Findings, rows: int) -> Iterator[_Cells]:
    return _cells(
        LOAD_COLUMNS,
        (
            (
                load,
                {
                    **_whose(findings, probe),
                    "trial_ids": str([*load.trial_ids]),
                    "first_divergence_from_1": _from_1(load.first_divergence_min),
                    "first_latent_from_1": _from_1(load.first_latent_min),
                    "width": _width(load),
                    "draft_tokens": _draft_tokens(load),
                },
            )
            for probe in findings.summary.probes
            for load in probe.loads
        ),
        rows,
    )


def properties_table(findings: Findings) -> pd.DataFrame:
    """properties.csv."""
    return _one_frame(PROPERTY_COLUMNS, _property_cells, findings)


def _property_cells(findings: Findings, rows: int) -> Iterator[_Cells]:
    return _cells(
        PROPERTY_COLUMNS,
        (
            (finding, {**_whose(findings, probe), **_property(findings, probe, finding)})
            for probe in findings.summary.probes
            for finding in probe.axes
        ),
        rows,
    )


def _property(findings: Findings, probe: ProbeSummary, finding: AxisFinding) -> _Row:
    """Without a verdict where the property was not asked for and did not diverge."""
    verdict = findings.verdicts[probe.arm, probe.probe_id].axes.get(finding.axis)
    fed, drafted = finding.tokens, finding.drafted
    return {
        "property": finding.axis,
        "verdict": verdict and verdict.outcome,
        "confidence": probe.confidence,
        "first_divergence_from_1": _from_1(finding.first_divergence_min),
        "first_latent_from_1": _from_1(finding.first_latent_min),
        "batch_sizes_diverged_json": _json(finding.batch_sizes_diverged),
        "batch_sizes_latent_json": _json(finding.batch_sizes_latent),
        "reasons_json": _json(verdict.reasons if verdict else ()),
        "fed_tokens": fed and fed.n_tokens,
        "fed_other_tokens": fed and fed.n_other_tokens,
        "fed_other_bits": fed and fed.n_other_bits,
        "width_classes_json": _json(fed.width_classes if fed else ()),
        "draft_proposed": drafted and drafted.n_proposed,
        "draft_accepted": drafted and drafted.n_accepted,
        "mean_accepted_length": drafted and drafted.mean_accepted_length,
    }


def summary_table(findings: Findings) -> pd.DataFrame:
    """summary.csv."""
    return _one_frame(SUMMARY_COLUMNS, _summary_cells, findings)


def _summary_cells(findings: Findings, rows: int) -> Iterator[_Cells]:
    return _cells(
        SUMMARY_COLUMNS,
        (
            (probe, {**_whose(findings, probe), **_judged(findings, probe)})
            for probe in findings.summary.probes
        ),
        rows,
    )


def _judged(findings: Findings, probe: ProbeSummary) -> _Row:
    verdict = findings.verdicts[probe.arm, probe.probe_id].verdict
    return {
        "verdict": verdict.outcome,
        "reasons": "; ".join(verdict.reasons),
        "reasons_json": _json(verdict.reasons),
        "n_answers": probe.answers and probe.answers.n_unique,
        "answer_flipped_draws": probe.answers and probe.answers.flipped_draws,
        "n_correct": probe.answers and probe.answers.n_correct,
    }


CSV_FILES: dict[str, tuple[Columns, Callable[[Findings, int], Iterator[_Cells]]]] = {
    "samples.csv": (SAMPLE_COLUMNS, _sample_cells),
    "completions.csv": (COMPLETION_COLUMNS, _completion_cells),
    "loads.csv": (LOAD_COLUMNS, _load_cells),
    "properties.csv": (PROPERTY_COLUMNS, _property_cells),
    "summary.csv": (SUMMARY_COLUMNS, _summary_cells),
}


def write_csv(name: str, findings: Findings, file: TextIO) -> None:
    """One of CSV_FILES: what the data frames hold, without making them, which takes longer."""
    columns, find = CSV_FILES[name]
    # RFC 4180 ends lines with CR LF.
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(columns)
    for cells in find(findings, ROWS_AT_ONCE):
        shown = (_shown(cells[name], kind) for name, kind in columns.items())
        writer.writerows(zip(*shown, strict=True))


def _shown(values: Sequence[Any], kind: str) -> Sequence[Any]:
    """The cells of one column, None where they are empty."""
    if kind == INT:
        return values
    if kind == TEXT:
        shown = {value: None if value is None else _csv_text(str(value)) for value in set(values)}
        return [shown[value] for value in values]
    if kind == FLOAT32:
        # By their bits: most of many rows are NaN, and to print one number takes long.
        bits, of_row = np.unique(np.array(values, np.float32).view(np.int32), return_inverse=True)
        kinds = bits.view(np.float32)
        texts = [
            t if math.isfinite(x) else None
            for t, x in zip(kinds.astype(str).tolist(), kinds, strict=True)
        ]
        return [texts[i] for i in of_row.tolist()]
    return [None if value is None or not math.isfinite(value) else value for value in values]


def _whose(findings: Findings, probe: ProbeSummary) -> _Row:
    return {"run_id": findings.run.run_id, "arm": probe.arm, "probe_id": probe.probe_id}


def _cells(columns: Columns, found: Iterable[tuple[object, _Row]], rows: int) -> Iterator[_Cells]:
    """Of each item what is given with it, and its own fields for the other columns."""
    items = iter(found)
    while chunk := list(islice(items, rows)):
        given = chunk[0][1]
        own = [name for name in columns if name not in given]
        fields = zip(*map(attrgetter(*own), (item for item, _ in chunk)), strict=True)
        yield {
            **{name: [row[name] for _, row in chunk] for name in given},
            **{name: list(values) for name, values in zip(own, fields, strict=True)},
        }


def _frames(columns: Columns, found: Iterator[_Cells]) -> Iterator[pd.DataFrame]:
    """At least one frame, so that an empty file has its header."""
    yield _frame(columns, next(found, {name: [] for name in columns}))
    yield from (_frame(columns, cells) for cells in found)


def _one_frame(
    columns: Columns, find: Callable[[Findings, int], Iterator[_Cells]], findings: Findings
) -> pd.DataFrame:
    (frame,) = _frames(columns, find(findings, sys.maxsize))
    return frame


def _frame(columns: Columns, cells: _Cells) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            name: pd.Series([_cell(value, kind) for value in cells[name]], dtype=kind)
            for name, kind in columns.items()
        }
    )


def _cell(value: Any, kind: str) -> Any:
    if kind == TEXT:
        return None if value is None else _csv_text(str(value))
    if kind == INT:
        return value
    return math.nan if value is None or not math.isfinite(value) else value
