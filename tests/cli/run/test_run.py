"""`ndcheck run`: verdicts, exit codes, files."""

from __future__ import annotations

import csv
import importlib.util
import json

import pytest

FIVE = "run-to-run,batch-size,slot,neighbours,cache"
"""Of these every completion counts as a sample; what `width` and `scoring` feed comes on top."""
FAST = ("--max-tokens", "8", "--loads", "1,4", "-n", "60", "--axes", FIVE, "--quiet")


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("behaviour", "code", "verdict"),
    [
        ("clean", 0, "PASS"),
        ("batch-dependent", 1, "FAIL"),
        ("latent", 1, "FAIL"),
        ("never-batches", 3, "INCONCLUSIVE"),
        ("out-of-memory", 3, "INCONCLUSIVE"),
        ("dies", 4, "INCONCLUSIVE"),
    ],
)
def test_exit_codes_follow_the_verdict(ndcheck_here, behaviour, code, verdict):
    done = ndcheck_here("run", "--model", f"scripted:{behaviour}", *FAST, "--out", "run")
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith(verdict)
    assert "Traceback" not in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_latent_divergence_may_be_allowed(ndcheck_here):
    done = ndcheck_here("run", "--model", "scripted:latent", *FAST, "--allow-latent")
    assert done.returncode == 0


def test_files_agree_with_each_other(ndcheck_here, tmp_path):
    done = ndcheck_here(
        "run", "--model", "scripted:slot-dependent", *FAST, "--out", "run", "--json"
    )
    document = json.loads(done.stdout)
    samples = read_csv(tmp_path / "run" / "samples.csv")
    completions = read_csv(tmp_path / "run" / "completions.csv")
    (summary,) = read_csv(tmp_path / "run" / "summary.csv")
    n_confirming = 2  # Loads along `slot` that diverged, once more.
    assert len(samples) == 60 + n_confirming == sum(int(row["count"]) for row in completions)
    assert {row["achieved_batch_size"] for row in samples} == {"1", "4"}
    assert all(row["achieved_batch_size"] == row["batch_size"] for row in samples)
    assert len(completions) == 2 == int(summary["n_unique"])
    diverged = {row["slot"] for row in samples if row["first_divergence"] == "3"}
    assert diverged == {"1", "2", "3"}
    assert all(row["first_divergence"] == "" for row in samples if row["slot"] == "0")
    assert document["verdict"] == "FAIL" == summary["verdict"]


def test_stdout_holds_the_result_and_stderr_the_progress(ndcheck_here):
    done = ndcheck_here("run", "--model", "scripted:clean", *FAST[:-1])
    assert "trials  unique" in done.stderr
    assert "trials  unique" not in done.stdout
    quiet = ndcheck_here("run", "--model", "scripted:clean", *FAST)
    assert quiet.stderr == ""


def test_dry_run_prints_the_plan_and_runs_nothing(ndcheck_here, tmp_path):
    done = ndcheck_here("run", "--model", "scripted:clean", *FAST, "--dry-run", "--verbose")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["trial", "arm", "probe", "axis"]
    assert "60 samples" in " ".join(done.stdout.split())
    assert lines[-2:] == ["prompt p1, as it is sent", "     user  'class Queue:'"]
    assert list(tmp_path.iterdir()) == []
    brief = ndcheck_here("run", "--model", "scripted:clean", *FAST, "--dry-run").stdout.splitlines()
    assert brief == lines[-len(brief) :]
    assert "60 samples" in " ".join(" ".join(brief[:3]).split())
    refused = ndcheck_here("run", "--model", "scripted:clean", "--verbose")
    assert refused.returncode == 2


def test_a_plan_says_how_long_it_takes_where_that_can_be_seen(ndcheck_here):
    options = ("--loads", "1,2", "-n", "12", "--max-tokens", "2", "--dry-run")
    assert "time: about 0:" in ndcheck_here("run", *options).stdout
    assert "time: unknown" in ndcheck_here("run", "--model", "scripted:clean", *options).stdout


def test_environment_variables_are_defaults(ndcheck_here):
    options = ("run", "--dry-run", "--max-tokens", "8")
    variables = {"NDCHECK_MODEL": "scripted:clean", "NDCHECK_SAMPLES": "20"}
    for more, samples in (((), "20 samples"), (("-n", "30"), "30 samples")):
        assert samples in " ".join(ndcheck_here(*options, *more, env=variables).stdout.split())


def test_target_rate_says_how_many_trials_up_front(ndcheck_here):
    options = ("--model", "scripted:clean", "--loads", "1,2", "--max-tokens", "4")
    done = ndcheck_here("run", *options, "--target-rate", "0.05", "--out", "run")
    assert "72 distinct loads of each probe and arm" in done.stderr
    assert "0 of 72 loads diverged; rate < 5 %" in done.stdout


def test_a_target_that_too_few_loads_exist_for_is_not_reached(ndcheck_here):
    options = ("--loads", "1", "--axes", "cache", "--max-tokens", "4", "--target-rate", "0.01")
    done = ndcheck_here("run", "--model", "scripted:clean", *options)
    assert done.returncode == 3
    assert "to exclude a rate of 1 % takes 368 clean loads; there are" in done.stdout


def test_a_grid_without_more_loads_says_so(ndcheck_here):
    options = ("--loads", "1", "--axes", "cache", "--max-tokens", "4", "-n", "150")
    done = ndcheck_here("run", "--model", "scripted:cache-dependent", *options)
    # Two words: a chunk, or a rest, of one token, by itself. Both loads ran once more.
    assert "FAIL  2 of 2 loads diverged (100 %, 95 % CI 15.8-100 %)" in done.stdout
    assert "no more than 2 distinct loads exist, and a repeat is no new draw" in " ".join(
        done.stdout.split()
    )


def test_a_page_and_plots_where_asked_for(ndcheck_here, tmp_path):
    options = ("--model", "scripted:slot-dependent", *FAST, "--out", "run", "--html", "--plots")
    done = ndcheck_here("run", *options)
    assert done.returncode == 1, done.stderr
    assert "wrote run/report.html" in done.stderr
    files = [tmp_path / "run" / "report.html", *(tmp_path / "run" / "plots").iterdir()]
    assert len(files) == 11
    before = {file: file.read_bytes() for file in files}
    for file in files:
        file.unlink()
    again = ndcheck_here("report", "run", "--html", "--plots")
    assert again.stdout == done.stdout
    assert {file: file.read_bytes() for file in files} == before


def test_plots_without_matplotlib_are_refused_before_anything_is_measured(
    ndcheck_here, tmp_path, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *args: None if name == "matplotlib" else find(name, *args),
    )
    options = ("--model", "scripted:clean", *FAST, "--out", "run", "--plots")
    done = ndcheck_here("run", *options)
    assert done.returncode == 2
    assert done.stderr == "ndcheck: --plots needs matplotlib: pip install 'ndcheck[plots]'\n"
    assert not (tmp_path / "run").exists()


def test_stop_on_divergence(ndcheck_here, tmp_path):
    options = ("--model", "scripted:batch-dependent", "--stop-on-divergence")
    done = ndcheck_here("run", *FAST, *options, "--out", "run")
    assert done.returncode == 1
    assert len(read_csv(tmp_path / "run" / "samples.csv")) < 60


def test_several_probes(ndcheck_here, tmp_path):
    options = ("--model", "scripted:clean", "--prompt", "one two", "--prompt", "three")
    done = ndcheck_here("run", *FAST, *options, "--out", "run")
    assert done.returncode == 0
    rows = read_csv(tmp_path / "run" / "summary.csv")
    assert [(row["probe_id"], row["n_samples"]) for row in rows] == [("p1", "60"), ("p2", "60")]


def test_hostile_completions_and_prompts_stay_text(ndcheck_here, tmp_path):
    prompt = "[red]x[/red] \x1b[31m \u202e =1+1 🧪\n| a |"
    options = ("--model", "scripted:hostile", "--prompt", prompt, "--out", "run")
    done = ndcheck_here("run", *FAST, "--max-tokens", "40", *options)
    assert done.returncode == 0
    for text in (done.stdout, (tmp_path / "run" / "report.md").read_text(encoding="utf-8")):
        assert not {"\x1b", "\x00", "\x07", "\u202e"} & set(text)
    (completion,) = read_csv(tmp_path / "run" / "completions.csv")
    assert "[red]markup[/red]" in completion["text"]
    for file in (tmp_path / "run").glob("*.csv"):
        for row in read_csv(file):
            for cell in row.values():
                assert not cell.startswith(("=", "+", "@", "\t", "\r")), (file.name, cell)


def test_default_directory_is_named_by_time_and_model(ndcheck_here, tmp_path):
    ndcheck_here("run", "--model", "scripted:clean", *FAST)
    (run,) = (tmp_path / "ndcheck-runs").iterdir()
    assert run.name.endswith("-scripted-clean")


def test_the_embedded_model_shows_nondeterminism_and_the_invariant_arm_none(ndcheck, tmp_path):
    """Real kernels on real model output: padding alone changes tokens or bits."""
    options = ("--loads", "1,2", "-n", "20", "--max-tokens", "16", "--kernels", "stock,invariant")
    done = ndcheck("run", *options, "--out", "run", "--quiet")
    assert done.returncode == 1, done.stderr
    rows = {row["arm"]: row for row in read_csv(tmp_path / "run" / "summary.csv")}
    assert rows["stock"]["verdict"] == "FAIL"
    assert rows["invariant"]["verdict"] == "PASS"
    assert rows["invariant"]["n_unique"] == "1"
    assert float(rows["invariant"]["slowdown_vs_stock"]) > 0
