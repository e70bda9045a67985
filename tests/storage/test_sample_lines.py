"""A line as it was written is decoded in parts, most of them once; what comes of it is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ndcheck.storage import run_directory
from ndcheck.storage.run_directory import SampleReader, read_run
from ndcheck.storage.sample_lines import decode_line

RUNS = Path(__file__).parents[1] / "runs"
LINES = [
    line
    for path in sorted(RUNS.glob("*/samples.jsonl"))
    for line in path.read_bytes().splitlines(keepends=True)
]


def test_it_does_not_matter_how_a_line_is_written():
    """With spaces, or its keys in another order, no part is where it was."""
    for line in LINES:
        document = json.loads(line)
        turned = dict(reversed(document.items()))
        assert decode_line(line) == decode_line(json.dumps(document).encode())
        assert decode_line(line) == decode_line(json.dumps(turned).encode() + b"\n")


@pytest.mark.parametrize("key", list(json.loads(LINES[0])))
def test_a_key_that_is_there_twice_is_refused_wherever_it_stands(key):
    own = json.dumps(json.loads(LINES[0])[key], separators=(",", ":")).encode()
    for other in json.loads(LINES[0]):
        before = f'"{other}":'.encode()
        twice = LINES[0].replace(before, b'"%b":%b,%b' % (key.encode(), own, before), 1)
        with pytest.raises(ValueError, match=f"the key '{key}' is there twice"):
            decode_line(twice)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"sample_id":0', b'"sample_id":00'),
        (b'"sample_id":0', b'"sample_id":-1'),
        (b'"sample_id":0', b'"sample_id":9999999999999999999'),
        (b'"slot":0', b'"slot":0.0'),
        (b'"baseline":null', b'"baseline":nil'),
        (b'"elapsed_s":', b'"elapsed_s":-'),
        (b'"arm":"stock"', b'"arm":"stuck"'),
        (b"}\n", b"\n"),
    ],
)
def test_what_is_no_json_or_no_sample_stays_so(old, new):
    line = next(line for line in LINES if b'"sample_id":0,' in line)
    assert old in line
    with pytest.raises(ValueError, match=r"."):
        decode_line(line.replace(old, new, 1))


def test_samples_are_read_once_and_those_of_a_large_file_again(monkeypatch):
    path = RUNS / "embedded"
    reader = SampleReader(path, read_run(path))
    first = list(reader)
    assert all(a is b for a, b in zip(first, reader, strict=True))
    monkeypatch.setattr(run_directory, "MOST_BYTES_KEPT", 0)
    streamed = SampleReader(path, read_run(path))
    assert list(streamed) == list(streamed) == first
    assert streamed.flaws == reader.flaws
