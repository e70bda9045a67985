"""What decides bits is recorded, and runs are compared where it matters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ndcheck import environment
from ndcheck.records import Environment

MODEL = {
    "engine": "vllm 1",
    "digest": "d",
    "dtype": "bfloat16",
    "device": "cpu",
    "attention": "sdpa",
    "invariant_by": None,
}


def test_capture_names_what_runs_here():
    here = environment.capture(MODEL)
    assert here.software["torch"] == torch.__version__
    assert here.hardware["cpu"]
    assert here.numeric_flags["threads"] == torch.get_num_threads()
    assert here.model == MODEL


def test_every_field_that_must_match_exists():
    here = environment.capture(MODEL)
    for path in environment.MUST_MATCH:
        group, _, name = path.partition(".")
        assert not name or name in getattr(here, group), path


def test_flags_are_read_not_assumed(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = environment.numeric_flags()
    assert before["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    torch.use_deterministic_algorithms(True)
    try:
        assert environment.numeric_flags()["deterministic_algorithms"] is True
    finally:
        torch.use_deterministic_algorithms(False)
    assert before["deterministic_algorithms"] is False


@pytest.mark.parametrize(
    ("changed", "path"),
    [
        ({"model": {**MODEL, "digest": "e"}}, "model.digest"),
        ({"software": {"torch": "1"}}, "software.torch"),
        ({"numeric_flags": {"threads": 64}}, "numeric_flags.threads: "),
    ],
)
def test_differences_that_change_bits(changed, path):
    a = environment.capture(MODEL)
    b = replace(a, **{k: {**getattr(a, k), **v} for k, v in changed.items()})
    (difference,) = environment.differences(a, b)
    assert difference.startswith(path)


def test_differences_that_do_not():
    a = environment.capture(MODEL)
    b = replace(a, software={**a.software, "python": "9"}, hardware={**a.hardware, "cpus": 1})
    assert environment.differences(a, b) == []
    assert environment.differences(Environment(), Environment()) == []


@pytest.mark.parametrize(
    ("flag", "value", "remedy"),
    [
        ("allow_tf32", True, "allow_tf32 = False"),
        ("CUBLAS_WORKSPACE_CONFIG", None, "export CUBLAS_WORKSPACE_CONFIG=:4096:8"),
        ("allow_bf16_reduced_precision_reduction", True, "precision_reduction = False"),
        ("cudnn_benchmark", True, "cudnn.benchmark = False"),
    ],
)
def test_advice_names_the_remedy(flag, value, remedy):
    fine = {
        "allow_tf32": False,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "allow_bf16_reduced_precision_reduction": False,
        "cudnn_benchmark": False,
    }
    assert environment.advice(fine, has_gpu=True) == []
    (note,) = environment.advice({**fine, flag: value}, has_gpu=True)
    assert remedy in note
