"""Files are input: what is wrong with one is said in a line, and nothing hangs or is believed."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import json
import math
import os
import shutil
import struct
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndcheck.api import Run, find_run
from ndcheck.config import read_checks
from ndcheck.errors import UsageError
from ndcheck.plan.prompts import read_prompts
from ndcheck.records import Endpoint, Engine, Load, RunSpec, Sample
from ndcheck.samplers.options import parse_object
from ndcheck.storage import reading
from ndcheck.storage.ranges import Range
from ndcheck.storage.reading import decode, parse_json, read_text
from ndcheck.storage.run_directory import SampleReader, read_run

FIXTURE = Path(__file__).parents[1] / "runs" / "schema-1"


@pytest.fixture
def run(tmp_path):
    """A copy of the run that is read for ever."""
    return shutil.copytree(FIXTURE, tmp_path / "run")


def test_the_first_schema_is_read_for_ever():
    record = read_run(FIXTURE)
    assert record.spec.arms == ("stock", "invariant")
    assert record.spec.decoding.max_tokens == 6
    assert record.n_trials_planned == 12 == len({s.trial_id for s in SampleReader(FIXTURE)})
    reader = SampleReader(FIXTURE, record)
    documents = [json.loads(line) for line in (FIXTURE / "samples.jsonl").read_text().splitlines()]
    samples = list(reader)
    assert (reader.bad_lines, reader.flaws) == ([], ())
    for sample, document in zip(samples, documents, strict=True):
        assert list(sample.token_ids) == document["token_ids"]
        assert sample.load.batch_size == document["batch_size"]
        assert sample.witness.achieved_batch_size == document["achieved_batch_size"]
        assert struct.pack(">6f", *sample.logprobs).hex() == document["logprob_bits"]
        assert "".join(sample.row_digests) == document["row_digests"]
        assert list(sample.margins) == document["margins"]
    assert Run(FIXTURE).verdict in ("PASS", "FAIL", "INCONCLUSIVE")


@pytest.mark.parametrize("record", [Load, Sample])
def test_fields_that_a_line_lacks_take_their_defaults(run, record):
    """So that a line from before a field was added is still read, in one place for all records."""
    file = run / "samples.jsonl"
    for field in dataclasses.fields(record):
        if field.default is dataclasses.MISSING or field.name in ("logprobs",):
            continue
        documents = [
            json.loads(line) for line in (FIXTURE / "samples.jsonl").read_text().splitlines()
        ]
        for document in documents:
            document.pop(field.name, None)
            document["added_later"] = {"deep": [1]}
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        reader = SampleReader(run)
        samples = list(reader)
        assert (len(samples), reader.bad_lines) == (len(documents), []), field.name


def test_fields_that_run_json_lacks_take_their_defaults(run):
    document = json.loads((FIXTURE / "run.json").read_text())
    for field in dataclasses.fields(RunSpec):
        if field.default is not dataclasses.MISSING:
            document["spec"].pop(field.name, None)
    document["spec"]["added_later"] = document["added_later"] = 1
    document["ndcheck_version"] = "99.0.0"
    (run / "run.json").write_text(json.dumps(document))
    spec = read_run(run).spec
    assert (spec.confidence, spec.engine, spec.seed) == (0.95, None, 0)


@pytest.mark.parametrize("version", [0, -1, True, False, "1", 1.0, None, [], {}, 10**30, math.nan])
def test_schema_versions_that_are_none(run, version):
    file = run / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": version}))
    with pytest.raises(UsageError, match=r"run\.json"):
        read_run(run)


WRONG = {
    "spec.decoding.max_tokens": (-1, 0, "8", 8.5, True, None, 2**31, 10**400, [], math.nan),
    "spec.confidence": (0, 1, 95, "high", math.inf, math.nan, True),
    "spec.batch_sizes": ([0], [-1], [True], ["2"], [2.0], "1,2", 5, None, {}),
    "spec.probes": ([], [{}], [{"probe_id": 1, "prompt": "x"}], ["x"], None, "x"),
    "spec.axes": ([], ["slot", "slot"], ["speed"], [[]], "slot", None),
    "spec.arms": ([], ["stock", "stock"], ["fast"], [None], {}),
    "spec.model": (1, None, [], "\ud800"),
    "spec.target_rate": (0, 2, "x"),
    "spec.engine": ("vllm", {"name": "other"}, {"name": "vllm", "tensor_parallel": 0}),
    "spec.endpoint": ("url", {}, {"url": 1}, {"url": "x", "timeout_s": -1}),
    "environment": (None, [], {"software": []}, {"model": {"digest": [[[[[[[[[1]]]]]]]]]}}),
    "status": ("done", None, 3),
    "elapsed_s": (-1, math.inf, "1", 10**400),
    "changes": ("it changed", [1], [["x"]]),
    "n_trials_planned": (-1, 1.5, 2**70),
}


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in WRONG.items() for v in values]
)
def test_fields_of_run_json_that_hold_something_else(run, field, value):
    file = run / "run.json"
    document = json.loads(file.read_text())
    *path, name = field.split(".")
    place = document
    for part in path:
        place = place[part]
    place[name] = value
    file.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=r"run\.json cannot be read: ") as caught:
        read_run(run)
    assert len(str(caught.value)) < 400 + len(str(run))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        "[" * 10**5,
        '{"a":' * 10**5,
        "NaN",
        "-Infinity",
        "1" * 10**5,
        "\ufeff1",
        "",
    ],
)
def test_json_that_is_none(text):
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


def special_files(folder):
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    return ("pipe", "folder", "loop", "/dev/zero", "/dev/stdin", "/dev/full", "missing", "x" * 300)


def test_what_is_no_file_is_neither_waited_for_nor_read(tmp_path):
    for name in special_files(tmp_path):
        with pytest.raises(OSError, match=r"\w"):
            read_text(tmp_path / name)
    with pytest.raises(OSError, match="cannot be used"):
        read_text(Path("a\0b"))


def test_a_run_whose_files_are_none(run, tmp_path):
    for name in special_files(tmp_path):
        for file in ("samples.jsonl", "run.json"):
            (run / file).unlink()
            (run / file).symlink_to(tmp_path / name)
            with pytest.raises(UsageError):
                Run(run)
            (run / file).unlink()
            shutil.copyfile(FIXTURE / file, run / file)


def test_configuration_and_prompts_that_are_no_files(tmp_path):
    for name in special_files(tmp_path):
        for read in (read_checks, read_prompts):
            with pytest.raises(UsageError):
                read(tmp_path / name)
        with pytest.raises(UsageError):
            find_run(name, tmp_path)


def test_lines_without_an_end(run, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1000)
    file = run / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for length in (1000, 1001, 1002, 2001, 2002, 10**6):
        for end in (b"\n", b""):
            file.write_bytes(lines[0] + b"x" * length + end)
            reader = SampleReader(run)
            assert len(list(reader)) == 1
            assert len(reader.bad_lines) == 1
    file.write_bytes(lines[0] + b"x" * 5000 + b"\n" + lines[1])
    assert len(list(SampleReader(run))) == 2


def test_a_document_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 2**20)
    (tmp_path / "run.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        read_run(tmp_path)


def test_a_run_that_grows_is_read_to_where_it_was(run):
    """By a process that is still measuring: every renderer has to see the same samples."""
    reader = SampleReader(run)
    n_samples = len(list(reader))
    with (run / "samples.jsonl").open("ab") as file:
        file.write((FIXTURE / "samples.jsonl").read_bytes())
    assert len(list(reader)) == n_samples


def values(kind):
    """Hypothesis strategies of JSON for a field's type, from the type itself."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        base, limits = arguments
        if not isinstance(limits, Range):
            return st.text()
        if base is int:
            return st.integers(int(limits.low), int(limits.high))
        return st.floats(
            limits.low, limits.high, exclude_min=limits.is_open, exclude_max=limits.is_open,
            allow_infinity=False, allow_nan=False,
        )  # fmt: skip
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if arguments:
        return st.none() | values(arguments[0])
    if dataclasses.is_dataclass(kind):
        return documents(kind)
    text = st.text(st.characters(exclude_categories=["Cs"]))
    return {str: text, bool: st.booleans(), int: st.integers(-(2**63), 2**63 - 1),
            float: st.floats(allow_nan=False, allow_infinity=False)}[kind]  # fmt: skip


def documents(record):
    hints = typing.get_type_hints(record, include_extras=True)
    return st.fixed_dictionaries(
        {field.name: values(hints[field.name]) for field in dataclasses.fields(record)}
    )


@given(st.sampled_from([Load, Engine, Endpoint, RunSpec]).flatmap(
    lambda record: st.tuples(st.just(record), documents(record))
))  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_whatever_a_record_can_hold_is_read_back(pair):
    record, document = pair
    decoded = decode(record, json.loads(json.dumps(document)))
    assert json.loads(json.dumps(dataclasses.asdict(decoded))) == json.loads(json.dumps(document))


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from([Load, RunSpec, Sample]),
    st.dictionaries(
        st.sampled_from([f.name for r in (Load, RunSpec, Sample) for f in dataclasses.fields(r)]),
        any_json,
    ),
)
@settings(deadline=None, max_examples=200)
def test_anything_else_is_a_value_error(record, document):
    with contextlib.suppress(ValueError):
        decode(record, document)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("m.jsonl", '{"prompt": "a", "id": {"b": 1}}', "id: give"),
        ("m.jsonl", '{"prompt": "a", "id": NaN}', "NaN is no JSON"),
        ("m.jsonl", "[" * 10**5, "nested too deeply"),
        ("m.txt", b"\xff\xfe", "UTF-8"),
    ],
)
def test_prompts_that_are_none(tmp_path, name, text, reason):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=reason):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "tool = 3", "[tool]\nndcheck = 3", "checks = []", "[checks]\na = 1",
        "checks.a.loads = [[1]]",
        "[checks.a]\nprompt = 1979-05-27", "[checks.'..']\nmodel='scripted:clean'",
        "[checks.a]\nloads = [999999999999999999999]", "[checks.a]\nconfidence = nan",
        "[checks.a]\ntimeout = inf", "[checks.a]\nprompts_file = 'a\\u0000b'", "a = " + "[" * 5000,
        "[checks.a.rules]\narms = [1]", "[checks.a.rules.stock]\nslot = 1", "x = " + "9" * 5000,
    ],
)  # fmt: skip
def test_configurations_that_are_none(tmp_path, text):
    for name in ("ndcheck.toml", "pyproject.toml"):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=name):
            read_checks(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    file = tmp_path / "ndcheck.toml"
    file.write_bytes(codecs.BOM_UTF8 + b'[checks.a]\nmodel = "scripted:clean"\n')
    assert [check.name for check in read_checks(file)] == ["a"]
    file.write_bytes(codecs.BOM_UTF8 + b'{"top_k": 1}')
    assert parse_object("--extra-body", f"@{file}") == {"top_k": 1}
