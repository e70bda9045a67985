"""The CSV exports as data frames: one contract with users, so columns are only ever appended.

Unknown is empty, never 0; integers stay integers beside it. Text that a spreadsheet would run as
a formula gets an apostrophe in front. New columns hold lists as JSON, and name positions as people
read them, from 1; the older ones count from 0.

Version history:

1. samples.csv, completions.csv, loads.csv, summary.csv.
2. properties.csv; ``run_id`` in every file, so that they join on it, ``arm`` and ``probe_id``;
   positions from 1 (``..._from_1``), lists as JSON (``..._json``, ``trial_ids``).
3. ``width``, ``fed_tokens``, ``fed_other_tokens``, ``fed_other_bits``, ``width_classes_json``.
4. ``draft_tokens``, ``draft_proposed``, ``draft_accepted``, ``accepted_lengths_json``,
   ``mean_accepted_length``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from ndcheck.analysis.summary import AxisFinding, LoadFinding, ProbeSummary
from ndcheck.findings import Findings
from ndcheck.records import Load
from ndcheck.reports.untrusted import csv_text

if TYPE_CHECKING:
    import pandas as pd

ROWS_PER_TABLE = 20_000
"""Bounds the memory of a large export; the file is the same whatever the number."""

_Columns = dict[str, str]
_Row = dict[str, Any]
"""A value for each column, by its name."""
_TEXT, _INT, _FLOAT = "object", "Int64", "float64"

SAMPLE_COLUMNS: _Columns = {
    "run_id": _TEXT,
    "arm": _TEXT,
    "probe_id": _TEXT,
    "trial_id": _INT,
    "sample_id": _INT,
    "batch_size": _INT,
    "achieved_batch_size": _INT,
    "slot": _INT,
    "filler_lengths": _TEXT,
    "cache_state": _TEXT,
    "n_tokens": _INT,
    "finish_reason": _TEXT,
    "completion_id": _INT,
    "first_divergence": _INT,
    "margin": "float32",
    "latent_divergence": _INT,
    "max_abs_dlogprob": "float32",
    "elapsed_s": _FLOAT,
    "error": _TEXT,
    "text": _TEXT,
    "n_retries": _INT,
    "axis": _TEXT,
    "baseline_trial_id": _INT,
    "first_divergence_from_1": _INT,
    "first_latent_from_1": _INT,
    "filler_lengths_json": _TEXT,
    "width": _INT,
    "fed_tokens": _INT,
    "fed_other_tokens": _INT,
    "fed_other_bits": _INT,
    "draft_tokens": _INT,
    "draft_proposed": _INT,
    "draft_accepted": _INT,
    "accepted_lengths_json": _TEXT,
}
COMPLETION_COLUMNS: _Columns = {
    "arm": _TEXT,
    "probe_id": _TEXT,
    "completion_id": _INT,
    "count": _INT,
    "share": _FLOAT,
    "first_divergence": _INT,
    "divergent_token": _TEXT,
    "reference_token": _TEXT,
    "n_tokens": _INT,
    "sha256": _TEXT,
    "text": _TEXT,
    "run_id": _TEXT,
    "first_divergence_from_1": _INT,
    "answer": _TEXT,
}
LOAD_COLUMNS: _Columns = {
    "arm": _TEXT,
    "probe_id": _TEXT,
    "axis": _TEXT,
    "batch_size": _INT,
    "slot": _INT,
    "n_trials": _INT,
    "n_samples": _INT,
    "n_unique": _INT,
    "n_diverged_trials": _INT,
    "first_divergence_min": _INT,
    "first_divergence_median": _FLOAT,
    "latent": _INT,
    "elapsed_s": _FLOAT,
    "tokens_per_s": _FLOAT,
    "cache_state": _TEXT,
    "run_id": _TEXT,
    "trial_ids": _TEXT,
    "n_errors": _INT,
    "first_divergence_from_1": _INT,
    "first_latent_from_1": _INT,
    "answer_flips": _INT,
    "n_correct": _INT,
    "width": _INT,
    "draft_tokens": _INT,
}
PROPERTY_COLUMNS: _Columns = {
    "run_id": _TEXT,
    "arm": _TEXT,
    "probe_id": _TEXT,
    "property": _TEXT,
    "verdict": _TEXT,
    "draw": _TEXT,
    "n_draws": _INT,
    "diverged_draws": _INT,
    "latent_draws": _INT,
    "rate": _FLOAT,
    "rate_ci_low": _FLOAT,
    "rate_ci_high": _FLOAT,
    "confidence": _FLOAT,
    "n_trials": _INT,
    "diverged_trials": _INT,
    "latent_trials": _INT,
    "first_divergence_from_1": _INT,
    "first_latent_from_1": _INT,
    "batch_sizes_diverged_json": _TEXT,
    "batch_sizes_latent_json": _TEXT,
    "reasons_json": _TEXT,
    "fed_tokens": _INT,
    "fed_other_tokens": _INT,
    "fed_other_bits": _INT,
    "width_classes_json": _TEXT,
    "draft_proposed": _INT,
    "draft_accepted": _INT,
    "mean_accepted_length": _FLOAT,
}
SUMMARY_COLUMNS: _Columns = {
    "arm": _TEXT,
    "probe_id": _TEXT,
    "n_trials": _INT,
    "n_samples": _INT,
    "n_unique": _INT,
    "modal_count": _INT,
    "common_prefix_tokens": _INT,
    "diverged_trials": _INT,
    "divergence_rate": _FLOAT,
    "rate_ci_low": _FLOAT,
    "rate_ci_high": _FLOAT,
    "confidence": _FLOAT,
    "unseen_mass": _FLOAT,
    "chao1": _FLOAT,
    "tokens_per_s": _FLOAT,
    "slowdown_vs_stock": _FLOAT,
    "verdict": _TEXT,
    "reasons": _TEXT,
    "draw": _TEXT,
    "n_draws": _INT,
    "diverged_draws": _INT,
    "run_id": _TEXT,
    "latent_draws": _INT,
    "latent_trials": _INT,
    "reasons_json": _TEXT,
    "n_answers": _INT,
    "answer_flipped_draws": _INT,
    "n_correct": _INT,
}


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
            "filler_lengths_json": json.dumps(sample.load.filler_lengths),
            "width": _width(sample.load),
            "fed_tokens": fed and fed.n_tokens,
            "fed_other_tokens": fed and fed.n_other_tokens,
            "fed_other_bits": fed and fed.n_other_bits,
            "draft_tokens": _draft_tokens(sample.load),
            "draft_proposed": drafted and sum(drafted.proposed),
            "draft_accepted": drafted and sum(drafted.accepted),
            "accepted_lengths_json": drafted and json.dumps(drafted.accepted),
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
    found = (
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
    return _frames(COMPLETION_COLUMNS, found, rows)


def loads_table(findings: Findings) -> pd.DataFrame:
    """loads.csv."""
    rows = [
        _row(
            LOAD_COLUMNS,
            load,
            _whose(findings, probe),
            trial_ids=json.dumps(load.trial_ids),
            first_divergence_from_1=_from_1(load.first_divergence_min),
            first_latent_from_1=_from_1(load.first_latent_min),
            width=_width(load),
            draft_tokens=_draft_tokens(load),
        )
        for probe in findings.summary.probes
        for load in probe.loads
    ]
    return _frame(LOAD_COLUMNS, rows)


def properties_table(findings: Findings) -> pd.DataFrame:
    """properties.csv."""
    rows = [
        _property_row(findings, probe, finding)
        for probe in findings.summary.probes
        for finding in probe.axes
    ]
    return _frame(PROPERTY_COLUMNS, rows)


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
        batch_sizes_diverged_json=json.dumps(finding.batch_sizes_diverged),
        batch_sizes_latent_json=json.dumps(finding.batch_sizes_latent),
        reasons_json=json.dumps(verdict.reasons if verdict else ()),
        fed_tokens=fed and fed.n_tokens,
        fed_other_tokens=fed and fed.n_other_tokens,
        fed_other_bits=fed and fed.n_other_bits,
        width_classes_json=json.dumps(fed.width_classes if fed else ()),
        draft_proposed=drafted and drafted.n_proposed,
        draft_accepted=drafted and drafted.n_accepted,
        mean_accepted_length=drafted and drafted.mean_accepted_length,
    )


def summary_table(findings: Findings) -> pd.DataFrame:
    """summary.csv."""
    rows = []
    for probe in findings.summary.probes:
        verdict = findings.verdicts[probe.arm, probe.probe_id].verdict
        judged = {
            "verdict": verdict.outcome,
            "reasons": "; ".join(verdict.reasons),
            "reasons_json": json.dumps(verdict.reasons),
            "n_answers": probe.answers and probe.answers.n_unique,
            "answer_flipped_draws": probe.answers and probe.answers.flipped_draws,
            "n_correct": probe.answers and probe.answers.n_correct,
        }
        rows.append(_row(SUMMARY_COLUMNS, probe, _whose(findings, probe), **judged))
    return _frame(SUMMARY_COLUMNS, rows)


def _whose(findings: Findings, probe: ProbeSummary) -> _Row:
    return {"run_id": findings.run.run_id, "arm": probe.arm, "probe_id": probe.probe_id}


def _row(columns: _Columns, item: object, whose: _Row, **derived: Any) -> _Row:
    """Whose it is, what is ``derived``, and the fields of ``item`` for the other columns."""
    given = whose | derived
    return given | {name: getattr(item, name) for name in columns if name not in given}


def _frames(columns: _Columns, found: Iterator[_Row], rows: int) -> Iterator[pd.DataFrame]:
    """At least one frame, so that an empty file has its header."""
    yield _frame(columns, list(islice(found, rows)))
    while chunk := list(islice(found, rows)):
        yield _frame(columns, chunk)


def _frame(columns: _Columns, rows: list[_Row]) -> pd.DataFrame:
    import pandas as pd

    series = {}
    for name, kind in columns.items():
        values = [_cell(row[name], kind) for row in rows]
        series[name] = pd.Series(values, dtype=kind)
    return pd.DataFrame(series)


def _cell(value: Any, kind: str) -> Any:
    if kind == _TEXT:
        return None if value is None else csv_text(str(value))
    if kind == _INT:
        return value
    return math.nan if value is None or not math.isfinite(value) else value
