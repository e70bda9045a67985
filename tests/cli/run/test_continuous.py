"""`ndcheck run --batching continuous` and `--loads auto`, as a user runs them."""

from __future__ import annotations

import json

OPTIONS = ("--batching", "continuous", "--loads", "4", "--axes", "batch-size,slot",
           "-n", "8", "--max-tokens", "8")  # fmt: skip


def test_a_run_says_how_it_batched_and_how_to_repeat_it(ndcheck_here, tmp_path):
    done = ndcheck_here("run", *OPTIONS, "--kernels", "invariant", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PASS")
    assert "continuous batching, arrivals closed" in " ".join(done.stdout.split())
    assert "--batching continuous" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "WARNING" not in done.stderr
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    steps = [s["step_batch_sizes"] for s in map(json.loads, lines) if s["batch_size"] == 4]
    assert len(steps) >= 5
    assert {tuple(sizes) for sizes in steps} == {(4,) * 8}
    again = ndcheck_here("report", "run")
    assert again.stdout.partition("repeat")[0] == done.stdout.partition("repeat")[0]


def test_arrivals_that_never_overlap_are_inconclusive(ndcheck_here):
    done = ndcheck_here("run", *OPTIONS, "--kernels", "invariant", "--arrivals", "poisson:0.001")
    assert done.returncode == 3, done.stderr
    assert "not witnessed at the size asked for" in " ".join(done.stdout.split())


def test_dry_run_shows_the_arrivals(ndcheck_here):
    done = ndcheck_here("run", *OPTIONS, "--arrivals", "together", "--dry-run")
    assert done.returncode == 0
    assert "continuous batching, arrivals together" in done.stdout


def test_auto_loads_are_named_and_repeatable(ndcheck_here):
    done = ndcheck_here("run", "--model", "scripted:out-of-memory", "--loads", "auto", "-n", "20",
                   "--max-tokens", "4", "--axes", "batch-size")  # fmt: skip
    assert "--loads auto is 1,2,3" in done.stderr
    assert "--loads 1,2,3" in done.stdout
    assert done.returncode == 0


def test_a_gate_finds_what_fits(ndcheck_here, tmp_path):
    (tmp_path / "ndcheck.toml").write_text(
        'loads = "auto"\nsamples = 30\nmax_tokens = 4\n'
        '[checks.fits]\nmodel = "scripted:out-of-memory"\n'
    )
    done = ndcheck_here("gate", "--out", "runs")
    assert done.returncode == 0, done.stderr
    spec = json.loads((tmp_path / "runs" / "fits" / "run.json").read_text())["spec"]
    assert spec["batch_sizes"] == [1, 2, 3]


def test_ops_are_named_under_exact_batching_only(ndcheck_here, tmp_path):
    run = ndcheck_here("run", "--model", "scripted:batch-dependent", "--out", "run", "-q",
                       "--loads", "1,4", "-n", "20", "--max-tokens", "8")  # fmt: skip
    assert run.returncode == 1
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    record["environment"]["model"]["class"] = "ModelOfThisProcess"
    record["spec"]["model"] = "builtin"
    for batching, is_offered in (("exact", True), ("continuous", False)):
        record["spec"]["batching"] = batching
        file.write_text(json.dumps(record))
        assert ("ndcheck trace" in ndcheck_here("report", "run").stdout) == is_offered
    for command in ("trace", "shrink"):
        refused = ndcheck_here(command, "--run", "run")
        assert refused.returncode == 2
        assert "continuous batching: no step can be repeated alone" in refused.stderr
