"""On a GPU: continuous batching in both arms, with the witness and the control of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ndcheck.analysis.summarising import summarise
from ndcheck.judging.verdict import judge
from ndcheck.plan.faults import plant_fault
from ndcheck.plan.trials import plan_trials
from ndcheck.records import Decoding, Environment, Probe, Run
from ndcheck.request import DEFAULTS
from ndcheck.runner import fit_spec
from ndcheck.samplers.local.sampler import TransformersSampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

N_TOKENS = 24
PROBE = Probe("p1", "Tell me about Richard Feynman")


def make_spec(directory, **changes):
    return replace(
        DEFAULTS,
        model=str(directory),
        device="cuda",
        random_weights=0,
        batching="continuous",
        probes=(PROBE,),
        decoding=Decoding(N_TOKENS),
        batch_sizes=(1, 5, 16),
        axes=("batch-size", "neighbours"),
        n_samples=60,
        **changes,
    )


@pytest.mark.parametrize("arrivals", ["closed", "poisson:1.0"])
def test_the_invariant_arm_is_and_stock_is_not_invariant(qwen3_shape, arrivals):
    spec = make_spec(qwen3_shape, arrivals=arrivals)
    sampler = TransformersSampler(spec)
    samples = []
    for trial in plan_trials(spec, {"p1": sampler.count_tokens(PROBE.prompt)}, sampler.context):
        fault = plant_fault(N_TOKENS) if trial.role == "control" else None
        samples += sampler.sample(replace(trial, fault=fault), PROBE, spec.decoding)
    summary = summarise(samples, spec)
    arms = {probe.arm: probe for probe in summary.probes}
    assert arms["stock"].latent_trials + arms["stock"].diverged_trials > 0
    assert arms["invariant"].n_unique == 1
    assert arms["invariant"].latent_trials == 0
    assert all(arm.control.n_caught == arm.control.n_trials == 1 for arm in arms.values())
    assert all(arm.unwitnessed_trials == 0 for arm in arms.values())
    assert all(s.witness.override_fires for s in samples if s.arm == "invariant")
    assert all(len(s.witness.step_batch_sizes) == len(s.token_ids) for s in samples)
    judgement = judge(Run("r", "0", spec, Environment(), "", "finished"), summary)
    outcomes = {probe.arm: probe.verdict.outcome for probe in judgement.probes}
    assert outcomes == {"stock": "FAIL", "invariant": "PASS"}


@pytest.mark.parametrize("batching", ["exact", "continuous"])
def test_auto_loads_fit(qwen3_shape, batching):
    spec = replace(make_spec(qwen3_shape), batching=batching, batch_sizes=())
    sampler = TransformersSampler(spec)
    largest = fit_spec(spec, sampler).batch_sizes[-1]
    assert largest >= 64
    spec = replace(spec, batch_sizes=(largest,), n_samples=largest + 1, axes=("batch-size",))
    for trial in plan_trials(spec, {"p1": sampler.count_tokens(PROBE.prompt)}, sampler.context):
        results = sampler.sample(trial, PROBE, spec.decoding)
        assert {r.witness.out_of_memory_at for r in results} == {None}
        assert {r.witness.achieved_batch_size for r in results} == {trial.load.batch_size}
