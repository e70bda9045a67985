"""Runs over an FP8 key-value cache: all properties hold in the invariant arm, and fail in stock."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ndcheck
from ndcheck.errors import UsageError
from ndcheck.records import Decoding, Load, Probe, Trial
from ndcheck.request import DEFAULTS, make_spec
from ndcheck.samplers.base import open_sampler

PROBE = Probe("p1", "tell me about the order of a sum")
SPEC = replace(DEFAULTS, probes=(PROBE,), decoding=Decoding(6), device="cpu", kv_cache_dtype="fp8")


def sampled(sampler, arm, batch_size, **load):
    load = Load(batch_size, slots=(0,), filler_lengths=(11,) * (batch_size - 1), **load)
    trial = Trial(0, arm, "p1", "slot", load, 0)
    return [(s.token_ids, s.row_digests) for s in sampler.sample(trial, PROBE, SPEC.decoding)]


def test_all_seven_properties_hold_where_stock_fails(tiny_models, tmp_path):
    run = ndcheck.measure(
        str(tiny_models["qwen3"]), out=tmp_path / "run", device="cpu", kv_cache_dtype="fp8",
        loads=[1, 2, 3], samples=40, max_tokens=10,
    )  # fmt: skip
    verdicts = {
        probe.arm: {axis: verdict.outcome for axis, verdict in probe.axes.items()}
        for probe in run.findings.judgement.probes
    }
    assert len(verdicts["invariant"]) == 7
    assert set(verdicts["invariant"].values()) == {"PASS"}
    assert "FAIL" in verdicts["stock"].values()


@pytest.mark.parametrize("arm", ["stock", "invariant"])
def test_the_cache_is_narrow_in_both_arms_and_changes_what_they_compute(arm, tiny_models):
    spec = replace(SPEC, model=str(tiny_models["qwen3"]))
    narrow, plain = open_sampler(spec), open_sampler(replace(spec, kv_cache_dtype="auto"))
    assert sampled(narrow, arm, 1) != sampled(plain, arm, 1)
    batch = narrow.open_batch([[1, 2, 3], [4, 5]], 2)
    with torch.inference_mode(), narrow.arm(arm):
        batch.compute_prompt("whole")
    kept = [layer.keys.dtype for layer in batch.cache.layers]
    assert set(kept) == {torch.float8_e4m3fn}


@pytest.mark.parametrize("state", ["prefix", "chunked"])
def test_a_prefix_computed_alone_has_the_bits_of_the_whole(state, tiny_models):
    sampler = open_sampler(replace(SPEC, model=str(tiny_models["qwen3"])))
    whole = sampled(sampler, "invariant", 3)
    assert sampled(sampler, "invariant", 3, cache_state=state) == whole
    assert sampled(sampler, "invariant", 1) == whole


def test_a_window_is_refused_by_name(tiny_models):
    sampler = open_sampler(replace(SPEC, model=str(tiny_models["gemma3"])))
    with pytest.raises(UsageError, match=r"--kv-cache-dtype fp8: .* StaticSlidingWindowLayer"):
        sampled(sampler, "invariant", 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_cache_dtype": "fp4"}, "--kv-cache-dtype fp4: give auto or fp8"),
        ({"kv_cache_dtype": "fp8", "batching": "continuous"}, "needs --batching exact"),
        ({"kv_cache_dtype": "fp8", "engine": "vllm"}, "--engine-arg kv_cache_dtype=fp8"),
    ],
)
def test_what_it_cannot_be_given_with(options, said):
    with pytest.raises(UsageError, match=said):
        make_spec(model="m", **options)
