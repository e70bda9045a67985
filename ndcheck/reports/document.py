"""The ``--json`` document: a run's findings as plain JSON values.

Schema history (changes only add):

1. 2026-11: first version.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ndcheck.analysis.summary import Completion, Metrics, ProbeSummary
from ndcheck.findings import Findings
from ndcheck.judging.verdict import ProbeVerdict, Verdict

SCHEMA_VERSION = 1
METRIC_NAMES = {
    "tar_r": "TARr@N",
    "tar_a": "TARa@N",
    "div_index": "Div_Index",
    "avg_std_top1_prob": "Avg_Std@top1_prob",
    "k1_kl": "k1_kl",
    "k3_kl": "k3_kl",
    "flip_rate_per_step": "flip_rate_per_step",
}
"""The published name of each field of Metrics."""


def make_document(findings: Findings) -> dict[str, Any]:
    """Everything found, without token ids; unknown is null, and numbers are finite."""
    run, summary, verdicts = findings.run, findings.summary, findings.verdicts
    found: dict[str, Any] = _finite(
        {
            "schema_version": SCHEMA_VERSION,
            "ndcheck_version": run.ndcheck_version,
            "run_id": run.run_id,
            "status": run.status,
            "stop_reason": run.stop_reason,
            "started_at": run.started_at,
            "elapsed_s": run.elapsed_s,
            "spec": dataclasses.asdict(run.spec),
            "environment": dataclasses.asdict(run.environment),
            **_verdict(findings.judgement.verdict),
            "fisher_p": summary.fisher_p,
            "probes": [_probe(p, verdicts[p.arm, p.probe_id]) for p in summary.probes],
        }
    )
    return found


def published(metrics: Metrics) -> dict[str, float | None]:
    return {name: getattr(metrics, field) for field, name in METRIC_NAMES.items()}


def _verdict(verdict: Verdict | None) -> dict[str, Any]:
    if verdict is None:  # evidence on a property that was not asked for
        return {"verdict": None, "reasons": []}
    return {"verdict": verdict.outcome, "reasons": list(verdict.reasons)}


def _probe(probe: ProbeSummary, verdict: ProbeVerdict) -> dict[str, Any]:
    nested = {
        *("completions", "axes", "loads", "control", "find_tree", "measure"),
        *("serving", "answers"),
    }
    scalars = {
        field.name: getattr(probe, field.name)
        for field in dataclasses.fields(probe)
        if field.name not in nested
    }
    return {
        **scalars,
        **_verdict(verdict.verdict),
        "axes": [
            {**dataclasses.asdict(finding), **_verdict(verdict.axes.get(finding.axis))}
            for finding in probe.axes
        ],
        "loads": [dataclasses.asdict(finding) for finding in probe.loads],
        "completions": [_completion(completion) for completion in probe.completions],
        "control": dataclasses.asdict(probe.control),
        "metrics": published(probe.metrics),
        "answers": None if probe.answers is None else dataclasses.asdict(probe.answers),
        "serving": None if probe.serving is None else dataclasses.asdict(probe.serving),
    }


def _completion(completion: Completion) -> dict[str, Any]:
    fields = (field.name for field in dataclasses.fields(completion))
    kept = {n: getattr(completion, n) for n in fields if n not in ("token_ids", "token_texts")}
    return {**kept, "text": completion.text}


def _finite(value: Any) -> Any:
    """The same with tuples as lists and without infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
