"""The run whose report is timed fails in stock, as planted, and passes in the invariant arm."""

from __future__ import annotations

from bench.measurement.report import write_run
from ndcheck.findings import read_findings


def test_what_is_planted_is_found(tmp_path):
    write_run(tmp_path / "run", "stock,invariant", 30)
    found = read_findings(tmp_path / "run")
    assert not found.run.flaws
    by_arm = {
        arm: [probe for probe in found.summary.probes if probe.arm == arm]
        for arm in ("stock", "invariant")
    }
    # Of the names q0 to q29 these have a digest that a tenth of all have.
    assert [p.probe_id for p in by_arm["stock"] if p.n_unique > 1] == ["q10", "q23"]
    assert all(p.has_latent or p.has_diverged for p in by_arm["stock"])
    assert {p.n_unique_bits for p in by_arm["invariant"]} == {1}
    outcomes = {(v.arm, v.verdict.outcome) for v in found.judgement.probes}
    assert outcomes == {("stock", "FAIL"), ("invariant", "PASS")}
