"""The run directory: exact round trips, and nothing finished is ever lost."""

from __future__ import annotations

import errno
import json
import math
import struct
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndcheck.errors import BackendError, UsageError
from ndcheck.records import Endpoint, Environment, Fault, Load, Run, Sample, Trial, Witness
from ndcheck.request import DEFAULTS
from ndcheck.storage.run_directory import RunDirectory, SampleReader, failed_samples, read_run

SERVER_RUN = Run(
    "r", "0.1.0",
    replace(DEFAULTS, endpoint=Endpoint("http://host/v1", header_names=("X-Team",))),
    Environment(), "", changes=("it changed",),
)  # fmt: skip
RUN = Run(
    "r", "0.1.0", DEFAULTS, Environment(model={"digest": "d"}), "2026-11-24T00:00:00+00:00",
    n_trials_planned=3,
)  # fmt: skip


def make_sample(sample_id=0, slots=(0,), slot=0, trial_id=0, **changed):
    load = Load(max(slots) + 1, slots)
    sample = Sample(
        sample_id, trial_id, "stock", "p1", "batch-size", 0, load, slot, Witness(load.batch_size),
        (1, 2), ("a", "b"), "length", 0.5, (-0.5, -0.25), (1.0, 0.0), ("0" * 16, "f" * 16),
    )  # fmt: skip
    return replace(sample, **changed)


def test_a_run_of_a_server_is_read_back(tmp_path):
    RunDirectory.create(tmp_path, SERVER_RUN).close()
    assert read_run(tmp_path) == SERVER_RUN


def write(path, *trials):
    with closing(RunDirectory.create(path, RUN)) as directory:
        for samples in trials:
            directory.append(samples)


fp32 = st.integers(0, 2**32 - 1).map(lambda bits: struct.unpack(">f", struct.pack(">I", bits))[0])


@given(
    texts=st.lists(st.text(), max_size=5),
    logprobs=st.lists(fp32.filter(lambda x: not math.isnan(x)), max_size=5),
    margins=st.lists(st.floats(0, allow_nan=False), max_size=5),
    digests=st.lists(st.binary(min_size=8, max_size=8).map(bytes.hex), max_size=5),
    fault=st.none() | st.just(Fault(1, 2)),
    error=st.none() | st.text(),
)
@settings(deadline=None, max_examples=50)
def test_round_trip(tmp_path_factory, texts, logprobs, margins, digests, fault, error):
    path = tmp_path_factory.mktemp("run")
    sample = make_sample(
        token_texts=tuple(texts),
        logprobs=tuple(logprobs),
        margins=tuple(margins),
        row_digests=tuple(digests),
        fault=fault,
        error=error,
    )
    write(path, [sample])
    (read,) = SampleReader(path)
    assert read == sample
    assert list(map(math.copysign, logprobs, read.logprobs)) == logprobs  # -0.0 is kept


def test_every_witness_is_read_back_and_older_files_are_too(tmp_path):
    witness = Witness(2, 1, 3, 4, (1, 2), 8, ((1, 2, 6, 2, 0, 0), (3, 2, 2, 2, 0, 1)))
    write(tmp_path, [make_sample(witness=witness)])
    (sample,) = SampleReader(tmp_path)
    assert sample.witness == witness
    lines = tmp_path / "samples.jsonl"
    document = json.loads(lines.read_text())
    for name in ("step_batch_sizes", "out_of_memory_at", "passes"):
        del document[name]
    lines.write_text(json.dumps(document) + "\n")
    (older,) = SampleReader(tmp_path)
    assert older.witness == Witness(2, 1, 3, 4)


def test_run_round_trip(tmp_path):
    run = replace(RUN, spec=replace(DEFAULTS, target_rate=0.1, answer_pattern="x"))
    RunDirectory.create(tmp_path, run).close()
    assert read_run(tmp_path) == run


def test_existing_content_is_never_overwritten(tmp_path):
    (tmp_path / "keep").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        RunDirectory.create(tmp_path, RUN)
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]
    with pytest.raises(UsageError, match="is a file"):
        RunDirectory.create(tmp_path / "keep", RUN)


def test_bad_lines_are_named_and_good_ones_kept(tmp_path):
    write(tmp_path, [make_sample(0)], [make_sample(1, trial_id=1)], [make_sample(2, trial_id=2)])
    file = tmp_path / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b'{"sample_id": 1}\n' + lines[2] + lines[1][:40])
    reader = SampleReader(tmp_path)
    assert [sample.sample_id for sample in reader] == [0, 2]
    assert [line.partition(" is ignored")[0] for line in reader.bad_lines] == [
        "samples.jsonl line 2",
        "samples.jsonl line 4",
    ]
    assert len(list(reader)) == 2
    assert len(reader.bad_lines) == 2


def test_newer_schema_is_refused(tmp_path):
    write(tmp_path)
    document = json.loads((tmp_path / "run.json").read_text())
    document["schema_version"] = 99
    (tmp_path / "run.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=r"schema version 99.*upgrade ndcheck"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 1}', "\udcff"])
def test_broken_run_file(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"run\.json cannot be read"):
        read_run(tmp_path)


def test_missing_run(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        read_run(tmp_path)


@pytest.mark.parametrize("tail", [b"", b'{"sample', b"\n"])
def test_resume_cuts_a_half_written_trial(tmp_path, tail):
    pair = [make_sample(1, (0, 1), 0, 1), make_sample(2, (0, 1), 1, 1)]
    write(tmp_path, [make_sample(0)], pair)
    file = tmp_path / "samples.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1] + tail)
    directory, finished = RunDirectory.resume(tmp_path)
    with closing(directory):
        assert [sample.sample_id for sample in finished] == [0]
        directory.append(pair)
    assert file.read_bytes() == whole


def test_resume_never_cuts_off_finished_trials_after_damage(tmp_path):
    write(tmp_path, [make_sample(0)], [make_sample(1, trial_id=1)])
    file = tmp_path / "samples.jsonl"
    damaged = b"x" + file.read_bytes()
    file.write_bytes(damaged)
    with pytest.raises(UsageError, match="damaged before its end"):
        RunDirectory.resume(tmp_path)
    assert file.read_bytes() == damaged


def test_second_process_is_refused(tmp_path):
    code = (
        "import sys, pathlib; from ndcheck.storage.run_directory import RunDirectory;"
        "RunDirectory.resume(pathlib.Path(sys.argv[1]))"
    )
    with closing(RunDirectory.create(tmp_path, RUN)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert f"UsageError: another ndcheck is writing {tmp_path}" in done.stderr


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    with closing(RunDirectory.create(tmp_path, RUN)) as directory:

        def refuse(content):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(directory, "_handle", type("Full", (), {
            "write": staticmethod(refuse), "close": staticmethod(directory._handle.close),
        }))  # fmt: skip
        with pytest.raises(BackendError, match="No space left on device"):
            directory.append([make_sample()])


def test_failed_trial_leaves_a_sample_for_each_slot():
    trial = Trial(7, "stock", "p1", "slot", Load(4, (1, 2)), 20, 3)
    samples = failed_samples(trial, "out of memory", 0.1)
    assert [(s.sample_id, s.slot, s.error) for s in samples] == [
        (20, 1, "out of memory"),
        (21, 2, "out of memory"),
    ]
