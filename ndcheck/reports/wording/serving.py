"""Where a server's answers came from, what of them agreed, and the batches they ran in."""

from __future__ import annotations

from ndcheck.analysis.serving import ServingFinding
from ndcheck.records import Run
from ndcheck.reports.wording.phrases import count


def origin(finding: ServingFinding, run: Run) -> str:
    """How many draws the answers can be, and which of ids, names and text agreed."""
    parts = [f"{count(finding.n_answers, 'answer')} through {finding.n_connections} connections"]
    if finding.has_own_fingerprints:
        parts.append("each with a system_fingerprint of its own")
    elif finding.fingerprints:
        parts.append(count(len(finding.fingerprints), "system_fingerprint"))
    has_ids = run.environment.model.get("compared") == "token ids"
    differ = {"ids": finding.ids_differ} if has_ids else {}
    if finding.names_differ is not None:
        differ["names"] = finding.names_differ
    differ["text"] = finding.texts_differ
    agreed = [name for name, n in differ.items() if not n]
    if agreed:
        parts.append(f"{' and '.join(agreed)} agreed")
    parts += [f"{name} differed in {n}" for name, n in differ.items() if n]
    return ", ".join(parts)


def batches(finding: ServingFinding) -> list[str]:
    """The sizes of the batches that the tokens ran in, a line for each number asked for."""
    return [f"{batch.asked} in flight: {batch.distribution}" for batch in finding.reached]
