"""The CSV exports, and the same as data frames; `columns` beside it says what they hold."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from operator import itemgetter
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

# Most cells of a large run are like many others.
_json = lru_cache(4096)(json.dumps)
_csv_text = lru_cache(4096)(csv_text)


def sample_tables(findings: Findings, rows: int = ROWS_PER_TABLE) -> Iterator[pd.DataFrame]:
    """samples.csv in tables of at most ``rows`` rows; controls are left out."""
    return _frames(SAMPLE_COLUMNS, _sample_rows(findings), rows)


def _sample_rows(findings: Findings) -> Iterator[_Row]:
    columns = findings.summary.samples
    outcomes = zip(
        columns.completion_id.tolist(),
        columns.first_divergence.tolist(),
        columns.margin,  # iterated as float32: a float64 would print digits that were never there
        columns.latent_divergence.tolist(),
        columns.max_abs_dlogprob,
        strict=True,
    )
    for sample, outcome in zip(findings.samples, outcomes, strict=True):
        completion_id, first_divergence, margin, latent_divergence, max_abs_dlogprob = outcome
        if sample.role == "control":
            continue
        failed, fed, drafted = sample.error is not None, sample.fed, sample.drafted
        yield {
            "run_id": findings.run.run_id,
            "arm": sample.arm,
            "probe_id": sample.probe_id,
            "trial_id": sample.trial_id,
            "sample_id": sample.sample_id,
            "batch_size": sample.load.batch_size,
            "achieved_batch_size": sample.witness.achieved_batch_size,
            "slot": sample.slot,
            "filler_lengths": " ".join(map(str, sample.load.filler_lengths)),
            "cache_state": sample.load.cache_state,
            "n_tokens": None if failed else len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            "completion_id": _known(completion_id),
            "first_divergence": _known(first_divergence),
            "margin": margin,
            "latent_divergence": _known(latent_divergence),
            "max_abs_dlogprob": max_abs_dlogprob,
            "elapsed_s": sample.elapsed_s,
            "error": sample.error,
            "text": None if failed else sample.text,
            "n_retries": sample.n_retries,
            "axis": sample.purpose,
            "baseline_trial_id": sample.baseline,
            "first_divergence_from_1": _from_1(_known(first_divergence)),
            "first_latent_from_1": _from_1(_known(latent_divergence)),
            "filler_lengths_json": _json(sample.load.filler_lengths),
            "width": _width(sample.load),
            "fed_tokens": fed and fed.n_tokens,
            "fed_other_tokens": fed and fed.n_other_tokens,
            "fed_other_bits": fed and fed.n_other_bits,
            "draft_tokens": _draft_tokens(sample.load),
            "draft_proposed": drafted and sum(drafted.proposed),
            "draft_accepted": drafted and sum(drafted.accepted),
            "accepted_lengths_json": drafted and _json(drafted.accepted),
        }


def _width(load: Load | LoadFinding) -> int | None:
    """None where the prompt is in the passes too."""
    return None if load.scores else load.width


def _draft_tokens(load: Load | LoadFinding) -> int | None:
    """How many tokens a draft proposes to a pass; None where there is none."""
    return load.width - 1 if load.drafts else None


def _known(number: int) -> int | None:
    return None if number < 0 else number


def _from_1(position: int | None) -> int | None:
    return None if position is None else position + 1


def completion_tables(findings: Findings, rows: int = ROWS_PER_TABLE) -> Iterator[pd.DataFrame]:
    """completions.csv in tables of at most ``rows`` rows."""
    return _frames(COMPLETION_COLUMNS, _completion_rows(findings), rows)


def _completion_rows(findings: Findings) -> Iterator[_Row]:
    return (
        _row(
            COMPLETION_COLUMNS,
            item,
            _whose(findings, probe),
            first_divergence_from_1=_from_1(item.first_divergence),
            answer=probe.answers and probe.answers.answers[item.completion_id - 1],
        )
        for probe in findings.summary.probes
        for item in probe.completions
    )


def loads_table(findings: Findings) -> pd.DataFrame:
    """loads.csv."""
    return _frame(LOAD_COLUMNS, list(_load_rows(findings)))


def _load_rows(findings: Findings) -> Iterator[_Row]:
    return (
        _row(
            LOAD_COLUMNS,
            load,
            _whose(findings, probe),
            trial_ids=str([*load.trial_ids]),
            first_divergence_from_1=_from_1(load.first_divergence_min),
            first_latent_from_1=_from_1(load.first_latent_min),
            width=_width(load),
            draft_tokens=_draft_tokens(load),
        )
        for probe in findings.summary.probes
        for load in probe.loads
    )


def properties_table(findings: Findings) -> pd.DataFrame:
    """properties.csv."""
    return _frame(PROPERTY_COLUMNS, list(_property_rows(findings)))


def _property_rows(findings: Findings) -> Iterator[_Row]:
    return (
        _property_row(findings, probe, finding)
        for probe in findings.summary.probes
        for finding in probe.axes
    )


def _property_row(findings: Findings, probe: ProbeSummary, finding: AxisFinding) -> _Row:
    """Without a verdict where the property was not asked for and did not diverge."""
    verdict = findings.verdicts[probe.arm, probe.probe_id].axes.get(finding.axis)
    fed, drafted = finding.tokens, finding.drafted
    return _row(
        PROPERTY_COLUMNS,
        finding,
        _whose(findings, probe),
        property=finding.axis,
        verdict=verdict and verdict.outcome,
        confidence=probe.confidence,
        first_divergence_from_1=_from_1(finding.first_divergence_min),
        first_latent_from_1=_from_1(finding.first_latent_min),
        batch_sizes_diverged_json=_json(finding.batch_sizes_diverged),
        batch_sizes_latent_json=_json(finding.batch_sizes_latent),
        reasons_json=_json(verdict.reasons if verdict else ()),
        fed_tokens=fed and fed.n_tokens,
        fed_other_tokens=fed and fed.n_other_tokens,
        fed_other_bits=fed and fed.n_other_bits,
        width_classes_json=_json(fed.width_classes if fed else ()),
        draft_proposed=drafted and drafted.n_proposed,
        draft_accepted=drafted and drafted.n_accepted,
        mean_accepted_length=drafted and drafted.mean_accepted_length,
    )


def summary_table(findings: Findings) -> pd.DataFrame:
    """summary.csv."""
    return _frame(SUMMARY_COLUMNS, list(_summary_rows(findings)))


def _summary_rows(findings: Findings) -> Iterator[_Row]:
    for probe in findings.summary.probes:
        verdict = findings.verdicts[probe.arm, probe.probe_id].verdict
        judged = {
            "verdict": verdict.outcome,
            "reasons": "; ".join(verdict.reasons),
            "reasons_json": _json(verdict.reasons),
            "n_answers": probe.answers and probe.answers.n_unique,
            "answer_flipped_draws": probe.answers and probe.answers.flipped_draws,
            "n_correct": probe.answers and probe.answers.n_correct,
        }
        yield _row(SUMMARY_COLUMNS, probe, _whose(findings, probe), **judged)


CSV_FILES: dict[str, tuple[Columns, Callable[[Findings], Iterator[_Row]]]] = {
    "samples.csv": (SAMPLE_COLUMNS, _sample_rows),
    "completions.csv": (COMPLETION_COLUMNS, _completion_rows),
    "loads.csv": (LOAD_COLUMNS, _load_rows),
    "properties.csv": (PROPERTY_COLUMNS, _property_rows),
    "summary.csv": (SUMMARY_COLUMNS, _summary_rows),
}


def write_csv(name: str, findings: Findings, file: TextIO) -> None:
    """One of CSV_FILES: what the data frames hold, without making them, which takes longer."""
    columns, find_rows = CSV_FILES[name]
    # RFC 4180 ends lines with CR LF.
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(columns)
    rows = map(itemgetter(*columns), find_rows(findings))
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        cells = map(_shown, zip(*chunk, strict=True), columns.values())
        writer.writerows(zip(*cells, strict=True))


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


def _row(columns: Columns, item: object, whose: _Row, **derived: Any) -> _Row:
    """Whose it is, what is ``derived``, and the fields of ``item`` for the other columns."""
    given = whose | derived
    return given | {name: getattr(item, name) for name in columns if name not in given}


def _frames(columns: Columns, found: Iterator[_Row], rows: int) -> Iterator[pd.DataFrame]:
    """At least one frame, so that an empty file has its header."""
    yield _frame(columns, list(islice(found, rows)))
    while chunk := list(islice(found, rows)):
        yield _frame(columns, chunk)


def _frame(columns: Columns, rows: list[_Row]) -> pd.DataFrame:
    import pandas as pd

    series = {}
    for name, kind in columns.items():
        values = [_cell(row[name], kind) for row in rows]
        series[name] = pd.Series(values, dtype=kind)
    return pd.DataFrame(series)


def _cell(value: Any, kind: str) -> Any:
    if kind == TEXT:
        return None if value is None else _csv_text(str(value))
    if kind == INT:
        return value
    return math.nan if value is None or not math.isfinite(value) else value
