from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ndcheck.findings import read_findings
from ndcheck.records import Load, Sample, Witness
from ndcheck.reports import tables
from ndcheck.reports.write import write_reports
from ndcheck.request import DEFAULTS

WHOSE = ["run_id", "arm", "probe_id"]
RUNS = Path(__file__).parents[1] / "runs"


def samples_of(example, rows=20_000):
    return list(tables.sample_tables(example, rows))


SAMPLES = (
    "run_id,arm,probe_id,trial_id,sample_id,batch_size,achieved_batch_size,slot,filler_lengths,"
    "cache_state,n_tokens,finish_reason,completion_id,first_divergence,margin,latent_divergence,"
    "max_abs_dlogprob,elapsed_s,error,text,n_retries,axis,baseline_trial_id,"
    "first_divergence_from_1,first_latent_from_1,filler_lengths_json,"
    "width,fed_tokens,fed_other_tokens,fed_other_bits,"
    "draft_tokens,draft_proposed,draft_accepted,accepted_lengths_json"
)
COMPLETIONS = (
    "arm,probe_id,completion_id,count,share,first_divergence,divergent_token,reference_token,"
    "n_tokens,sha256,text,run_id,first_divergence_from_1,answer"
)
LOADS = (
    "arm,probe_id,axis,batch_size,slot,n_trials,n_samples,n_unique,n_diverged_trials,"
    "first_divergence_min,first_divergence_median,latent,elapsed_s,tokens_per_s,cache_state,"
    "run_id,trial_ids,n_errors,first_divergence_from_1,first_latent_from_1,"
    "answer_flips,n_correct,width,draft_tokens"
)
PROPERTIES = (
    "run_id,arm,probe_id,property,verdict,draw,n_draws,diverged_draws,latent_draws,rate,"
    "rate_ci_low,rate_ci_high,confidence,n_trials,diverged_trials,latent_trials,"
    "first_divergence_from_1,first_latent_from_1,batch_sizes_diverged_json,"
    "batch_sizes_latent_json,reasons_json,"
    "fed_tokens,fed_other_tokens,fed_other_bits,width_classes_json,"
    "draft_proposed,draft_accepted,mean_accepted_length"
)
SUMMARY = (
    "arm,probe_id,n_trials,n_samples,n_unique,modal_count,common_prefix_tokens,diverged_trials,"
    "divergence_rate,rate_ci_low,rate_ci_high,confidence,unseen_mass,chao1,tokens_per_s,"
    "slowdown_vs_stock,verdict,reasons,draw,n_draws,diverged_draws,run_id,latent_draws,"
    "latent_trials,reasons_json,n_answers,answer_flipped_draws,n_correct"
)


def test_columns_are_those_of_the_contract(failing) -> None:
    assert ",".join(samples_of(failing)[0]) == SAMPLES
    assert ",".join(next(tables.completion_tables(failing))) == COMPLETIONS
    assert ",".join(tables.loads_table(failing)) == LOADS
    assert ",".join(tables.properties_table(failing)) == PROPERTIES
    assert ",".join(tables.summary_table(failing)) == SUMMARY


def test_one_row_per_sample_and_counts_that_add_up(failing) -> None:
    (samples,) = samples_of(failing)
    (completions,) = tables.completion_tables(failing)
    assert len(samples) == completions["count"].sum() == 1000
    assert samples["completion_id"].value_counts().to_dict() == {1: 992, 2: 8}


def test_unknown_is_missing_and_integers_stay_integers(inconclusive) -> None:
    (samples,) = samples_of(inconclusive)
    failed = samples[samples["error"].notna()]
    assert len(failed) == 100
    for column in ("achieved_batch_size", "n_tokens", "completion_id", "first_divergence"):
        assert samples[column].dtype == "Int64"
        assert failed[column].isna().all()
    assert failed[["margin", "max_abs_dlogprob", "text"]].isna().all(axis=None)


def test_floats_print_the_digits_that_were_measured(failing) -> None:
    (samples,) = samples_of(failing)
    rows = csv.DictReader(io.StringIO(samples.to_csv(index=False), newline=""))
    assert {row["margin"] for row in rows} == {"", "0.1"}


def test_infinite_margins_are_empty(failing) -> None:
    columns = replace(failing.summary.samples, margin=np.full(1000, np.inf, np.float32))
    example = replace(failing, summary=replace(failing.summary, samples=columns))
    assert samples_of(example)[0]["margin"].isna().all()


def test_controls_are_left_out_but_keep_their_place(failing) -> None:
    control = Sample(
        sample_id=-7,
        trial_id=1,
        arm="stock",
        probe_id="p1",
        purpose="control",
        baseline=0,
        load=Load(1),
        slot=0,
        witness=Witness(1),
        token_ids=(1,),
        token_texts=("x",),
        finish_reason="stop",
        elapsed_s=0.1,
    )
    old = failing.summary.samples
    columns = replace(
        old,
        **{
            name: np.insert(getattr(old, name), 1, np.zeros(1, getattr(old, name).dtype))
            for name in old.__dataclass_fields__
        },
    )
    example = replace(
        failing,
        samples=[failing.samples[0], control, *failing.samples[1:]],
        summary=replace(failing.summary, samples=columns),
    )
    pd.testing.assert_frame_equal(samples_of(example)[0], samples_of(failing)[0])


def test_tables_in_parts_hold_the_same(failing) -> None:
    parts = samples_of(failing, rows=300)
    assert [len(part) for part in parts] == [300, 300, 300, 100]
    whole = pd.concat(parts, ignore_index=True)
    pd.testing.assert_frame_equal(whole, samples_of(failing)[0])


def test_an_empty_run_has_empty_tables_with_headers(empty) -> None:
    assert [len(part) for part in samples_of(empty)] == [0]
    assert [len(part) for part in tables.completion_tables(empty)] == [0]
    assert tables.loads_table(empty).empty
    assert tables.properties_table(empty).empty
    assert tables.summary_table(empty).empty


def test_hostile_text_is_neutralised_and_numbers_are_not(hostile) -> None:
    (samples,) = samples_of(hostile)
    assert set(samples["probe_id"]) == {r"'=p\x1b[1m", "'-p2"}
    assert samples["error"].dropna().tolist() == [r"'=cmd(): out of memory\x1b[31m at batch 64"]
    columns = replace(hostile.summary.samples, margin=np.full(13, -0.5, np.float32))
    example = replace(hostile, summary=replace(hostile.summary, samples=columns))
    text = samples_of(example)[0].to_csv(index=False)
    assert {row["margin"] for row in csv.DictReader(io.StringIO(text, newline=""))} == {"-0.5"}


@pytest.fixture(params=sorted(path.name for path in RUNS.iterdir() if path.is_dir()))
def files(request, tmp_path):
    """What pandas reads from the CSV files of a recorded run, and the run's samples.jsonl."""
    found = replace(read_findings(RUNS / request.param), directory=tmp_path)
    write_reports(found, DEFAULTS)
    names = ("samples", "completions", "loads", "properties", "summary")
    frames = {name: pd.read_csv(tmp_path / f"{name}.csv", dtype={"arm": str}) for name in names}
    lines = (RUNS / request.param / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return frames, [json.loads(line) for line in lines]


def test_the_files_join_with_one_another_and_with_the_samples(files) -> None:
    frames, lines = files
    run_ids = {run_id for frame in frames.values() for run_id in frame["run_id"]}
    assert len(run_ids) == 1
    samples, completions = frames["samples"], frames["completions"]
    measured = samples[samples["error"].isna()]
    assert len(measured) == completions["count"].sum()

    of_completions = measured.merge(completions, on=[*WHOSE, "completion_id"], validate="m:1")
    assert len(of_completions) == len(measured)
    assert (of_completions["text_x"] == of_completions["text_y"]).all()

    loads = frames["loads"].assign(trial_id=frames["loads"]["trial_ids"].map(json.loads))
    loads = loads.explode("trial_id").astype({"trial_id": "int64"})
    of_loads = samples.merge(loads, on=[*WHOSE, "trial_id"], validate="m:1")
    assert len(of_loads) == len(samples)
    for column in ("axis", "batch_size", "cache_state"):
        assert (of_loads[f"{column}_x"] == of_loads[f"{column}_y"]).all(), column

    of_arms = frames["properties"].merge(frames["summary"], on=WHOSE, validate="m:1")
    assert len(of_arms) == len(frames["properties"])

    by_id = {line["sample_id"]: line for line in lines if line["axis"] != "control"}
    assert set(samples["sample_id"]) == set(by_id)
    own = [by_id[sample_id] for sample_id in samples["sample_id"]]
    assert samples["axis"].tolist() == [line["axis"] for line in own]
    baselines = samples["baseline_trial_id"].astype("Int64").astype(object)
    assert baselines.where(baselines.notna(), None).tolist() == [line["baseline"] for line in own]


def test_lists_are_json_and_positions_count_from_1(files) -> None:
    for name, frame in files[0].items():
        for column in frame:
            if column.endswith("_json") or column == "trial_ids":
                assert all(isinstance(json.loads(cell), list) for cell in frame[column]), name
        for old in ("first_divergence", "first_divergence_min", "latent_divergence"):
            new = "first_latent_from_1" if old.startswith("latent") else "first_divergence_from_1"
            if old in frame and new in frame:
                pd.testing.assert_series_equal(frame[old] + 1, frame[new], check_names=False)


def test_the_main_table_is_in_properties_csv() -> None:
    """The figures of the embedded run's screen, as it is kept."""
    frame = tables.properties_table(read_findings(RUNS / "embedded")).set_index(["arm", "property"])
    row = frame.loc[("stock", "batch-size")]
    shown = ("verdict", "draw", "n_draws", "diverged_draws", "latent_draws")
    assert [row[name] for name in shown] == ["FAIL", "load", 1, 0, 1]
    assert round(row["rate_ci_high"], 4) == 0.975
    assert pd.isna(row["first_divergence_from_1"])
    assert (json.loads(row["batch_sizes_latent_json"]), row["first_latent_from_1"]) == ([4], 1)
