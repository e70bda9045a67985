"""A server is measured from Python, gated and asserted on like any model."""

from __future__ import annotations

import asyncio
import zlib

import pytest

import ndcheck
from ndcheck.cli.app import run_command_line
from ndcheck.errors import BackendError, UsageError
from ndcheck.testing import assert_deterministic

SMALL = {"loads": [1, 3], "samples": 22, "max_tokens": 8}


def test_measure(mock, tmp_path):
    options = {**SMALL, "model": "mock", "header": "X-Team: hidden", "out": tmp_path / "run"}
    run = ndcheck.measure(endpoint=mock(flavour="llama.cpp"), **options)
    assert run.verdict == "PASS", run.reasons
    spec = run.record.spec
    assert (spec.arms, spec.endpoint.header_names) == (("stock",), ("X-Team",))
    assert run.record.environment.model["server"] == "llama.cpp"
    assert not [f for f in run.path.iterdir() if "hidden" in f.read_text(encoding="utf-8")]
    assert set(run.samples["n_retries"]) == {0}


def test_measure_beside_a_loop_that_runs_already(mock, tmp_path):
    """As a notebook's does, in the thread of its cells."""

    async def cell(**options):
        return ndcheck.measure(model="mock", **SMALL, **options)

    run = asyncio.run(cell(endpoint=mock(), out=tmp_path / "run"))
    assert run.verdict == "PASS", run.reasons
    with pytest.raises(BackendError, match="cannot connect"):
        asyncio.run(cell(endpoint="http://127.0.0.1:9/v1", out=tmp_path / "none"))


@pytest.mark.parametrize("flavour", ["vllm", "text"])
def test_the_prompt_s_ids_are_recorded_where_the_server_gives_them(mock, tmp_path, flavour):
    options = {**SMALL, "model": "mock", "prompt": "one two", "out": tmp_path / "run"}
    run = ndcheck.measure(endpoint=mock(flavour=flavour), **options)
    words = " ".join(str(zlib.crc32(word) >> 16) for word in (b"one", b"two"))
    assert run.record.prompt_token_ids == ((words,) if flavour == "vllm" else ())
    if flavour == "text":
        assert run_command_line(["score", str(run.path), "--model", "builtin"]) == 2


def test_a_property_that_the_server_cannot_vary_is_refused_only_where_named(mock, tmp_path):
    url = mock(flavour="text")
    run = ndcheck.measure("mock", endpoint=url, out=tmp_path / "run", **SMALL)
    assert run.record.spec.axes == ("run-to-run", "batch-size", "slot", "neighbours")
    with pytest.raises(UsageError, match="--axes: what the prefix cache holds cannot be set"):
        ndcheck.measure("mock", endpoint=url, axes="cache", out=tmp_path / "other", **SMALL)


def test_assert_deterministic(mock):
    assert_deterministic("mock", endpoint=mock(), **SMALL)
    with pytest.raises(AssertionError, match="FAIL"):
        assert_deterministic("mock", endpoint=mock(fault="concurrency"), **SMALL)


def test_the_ops_of_a_server_are_not_traced(mock, tmp_path, capsys):
    url = mock(fault="concurrency")
    run = ndcheck.measure("mock", endpoint=url, out=tmp_path / "run", **SMALL)
    for command in ("trace", "shrink"):
        assert run_command_line([command, "--run", str(run.path)]) == 2
        assert f"mock runs at {url}: no op can be seen there" in capsys.readouterr().err
    assert "ndcheck trace" not in (run.path / "report.md").read_text(encoding="utf-8")


def test_gate(mock, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    config = f"""
        endpoint = "{mock(step_s=0.02)}"
        model = "mock"
        loads = [1, 3]
        samples = 22
        max_tokens = 8
        [checks.served]
        [checks.faulty]
        endpoint = "{mock(fault="concurrency", step_s=0.02)}"
        [checks.gone]
        endpoint = "http://127.0.0.1:9/v1"
        [checks.vacuous]
        endpoint = "{mock(flavour="text")}"
        [checks.vacuous.rules.cache]
        allow_latent = true
    """
    (tmp_path / "ndcheck.toml").write_text(config)
    for check, code in (("served", 0), ("faulty", 1), ("gone", 4), ("vacuous", 2)):
        assert run_command_line(["gate", "--check", check]) == code, capsys.readouterr()
    assert "cache: not measured" in capsys.readouterr().err
