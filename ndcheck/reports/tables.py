"""The CSV exports as data frames: one contract with users, so columns are only ever appended.

Unknown is empty, never 0; integers stay integers beside it. Text that a spreadsheet would run as
a formula gets an apostrophe in front.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from ndcheck.analysis.summary import Completion, LoadFinding, ProbeSummary
from ndcheck.findings import Findings
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
        failed = sample.error is not None
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
        }


def _known(number: int) -> int | None:
    return None if number < 0 else number


def completion_tables(findings: Findings, rows: int = ROWS_PER_TABLE) -> Iterator[pd.DataFrame]:
    """completions.csv in tables of at most ``rows`` rows."""
    found = (
        _row(COMPLETION_COLUMNS, probe, item)
        for probe in findings.summary.probes
        for item in probe.completions
    )
    return _frames(COMPLETION_COLUMNS, found, rows)


def loads_table(findings: Findings) -> pd.DataFrame:
    """loads.csv."""
    probes = findings.summary.probes
    rows = [_row(LOAD_COLUMNS, probe, load) for probe in probes for load in probe.loads]
    return _frame(LOAD_COLUMNS, rows)


def _row(columns: _Columns, probe: ProbeSummary, item: Completion | LoadFinding) -> _Row:
    """Whose it is, and the fields of ``item`` that have the other columns' names."""
    own = {"arm": probe.arm, "probe_id": probe.probe_id}
    return own | {name: getattr(item, name) for name in columns if name not in own}


def summary_table(findings: Findings) -> pd.DataFrame:
    """summary.csv."""
    rows = []
    for probe in findings.summary.probes:
        verdict = findings.verdicts[probe.arm, probe.probe_id].verdict
        judged = {"verdict": verdict.outcome, "reasons": "; ".join(verdict.reasons)}
        measured = {name: getattr(probe, name) for name in SUMMARY_COLUMNS if name not in judged}
        rows.append(measured | judged)
    return _frame(SUMMARY_COLUMNS, rows)


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
