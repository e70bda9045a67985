"""Continuous batching: the manager's own batches, witnessed at every step, in both arms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ndcheck.analysis.summarising import summarise
from ndcheck.errors import TrialError, UsageError
from ndcheck.judging.verdict import judge
from ndcheck.plan.faults import plant_fault
from ndcheck.plan.trials import plan_trials
from ndcheck.records import Decoding, Environment, Fault, Load, Probe, Run, Trial
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local import continuous
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck.samplers.options import SCHEDULED_AXES

PROBE = Probe("p1", "tell me about the order of a sum")
N_TOKENS = 12
GREEDY = Decoding(N_TOKENS)
SPEC = replace(
    DEFAULTS, probes=(PROBE,), decoding=GREEDY, device="cpu", batching="continuous",
    axes=SCHEDULED_AXES,
)  # fmt: skip
LOADS = [
    Load(1),
    Load(4, (0, 1, 2, 3), filler_seed=3),
    Load(4, (1,), (13, 3, 8), 7),
    Load(3, (2,), (8, 8), 9, "chunked"),
    Load(3, (0,), (9, 4), 9, "prefix"),
]


@pytest.fixture(scope="module")
def open_sampler(tiny_models):
    """``open_sampler(family, **spec)``"""

    def make(family="qwen3", **changes):
        return TransformersSampler(replace(SPEC, model=str(tiny_models[family]), **changes))

    return make


@pytest.fixture(scope="module")
def sampler(open_sampler):
    return open_sampler()


def sample(sampler, load, decoding=GREEDY, fault=None, arm="stock"):
    return sampler.sample(Trial(0, arm, "p1", "slot", load, 0, fault=fault), PROBE, decoding)


def measure(sampler, spec):
    """Every trial of the plan, and the verdict on them."""
    samples = []
    lengths = {"p1": sampler.count_tokens(PROBE.prompt)}
    for trial in plan_trials(spec, lengths, sampler.context):
        fault = plant_fault(N_TOKENS) if trial.role == "control" else None
        samples += sampler.sample(replace(trial, fault=fault), PROBE, spec.decoding)
    run = Run("r", "0", spec, Environment(), "", "finished")
    return samples, judge(run, summarise(samples, spec))


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
@pytest.mark.parametrize("arrivals", ["closed", "together", "poisson:0.4"])
def test_tokens_are_those_of_the_exact_batch(open_sampler, family, arrivals):
    """In fp32 rounding does not reach the tokens, so any other token is a mistake."""
    (alone,) = sample(open_sampler(family, dtype="fp32", batching="exact"), Load(1))
    sampler = open_sampler(family, dtype="fp32", arrivals=arrivals)
    attention = sampler._model.config._attn_implementation
    for load in LOADS:
        if family == "gemma3" and load.cache_state == "prefix":
            with pytest.raises(TrialError, match="shared no page"):
                sample(sampler, load)
            continue
        results = sample(sampler, load)
        assert [r.slot for r in results] == list(load.slots)
        for result in results:
            assert result.token_ids == alone.token_ids
            assert result.finish_reason == "length"
            assert len(result.row_digests) == N_TOKENS
            torch.testing.assert_close(
                torch.tensor([result.logprobs, result.margins]),
                torch.tensor([alone.logprobs, alone.margins]),
                rtol=1e-3,
                atol=1e-3,
            )
    assert sampler._model.config._attn_implementation == attention
    assert not sampler._model._forward_hooks


def test_every_step_is_witnessed(open_sampler, sampler):
    for load in LOADS:
        for result in sample(sampler, load):
            assert result.witness.step_batch_sizes == (load.batch_size,) * N_TOKENS
            assert result.witness.achieved_batch_size == load.batch_size
            assert result.witness.decode_calls == N_TOKENS - 1
            assert result.witness.prefill_calls == (3 if load.cache_state == "chunked" else 1)
    together = open_sampler(arrivals="together")
    (result,) = sample(together, Load(6, (2,), (8,) * 5, 1))
    sizes = result.witness.step_batch_sizes
    assert sizes[0] == 6 == result.witness.achieved_batch_size
    assert list(sizes) == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1
    poisson = open_sampler(arrivals="poisson:0.3")
    (result,) = sample(poisson, Load(6, (2,), (8,) * 5, 1), Decoding(40))
    sizes = result.witness.step_batch_sizes
    assert len(sizes) == 40
    assert len(set(sizes)) > 2
    assert max(sizes) == result.witness.achieved_batch_size <= 6


def test_company_changes_while_a_probe_decodes(sampler, monkeypatch):
    seen = []
    original = continuous.ContinuousBatch._step

    def step(self):
        original(self)
        seen.append({future.state.request_id for future in
                     self._processor.inputs_and_outputs.requests_in_batch})  # fmt: skip

    monkeypatch.setattr(continuous.ContinuousBatch, "_step", step)
    sample(sampler, Load(4, (1,), (13, 3, 8), 7))
    assert {len(names) for names in seen} == {4}
    with_probe = [frozenset(names) for names in seen if "5" in names]  # After 4 and row 0.
    assert len(with_probe) == N_TOKENS
    assert len(set(with_probe)) > 2


def test_the_same_load_meets_the_same_company(sampler):
    first, second = (sample(sampler, LOADS[2])[0] for _ in range(2))
    assert replace(first, elapsed_s=0) == replace(second, elapsed_s=0)


def test_stock_bits_follow_the_company_and_invariant_bits_do_not(sampler):
    spec = replace(SPEC, batch_sizes=(1, 3), n_samples=22)
    samples, judgement = measure(sampler, spec)
    digests = {"stock": set(), "invariant": set()}
    for result in samples:
        assert bool(result.witness.override_fires) == (result.arm == "invariant")
        if result.role != "control":
            digests[result.arm].add(result.row_digests)
    assert {result.purpose for result in samples} > set(SCHEDULED_AXES)
    assert len(digests["stock"]) > 1
    assert len(digests["invariant"]) == 1
    outcomes = {probe.arm: probe.verdict.outcome for probe in judgement.probes}
    assert outcomes == {"stock": "FAIL", "invariant": "PASS"}


INVARIANT_ALONE = replace(
    SPEC, arms=("invariant",), batch_sizes=(3,), axes=("batch-size", "slot"), n_samples=8
)


def test_an_order_that_follows_the_batch_is_caught(sampler, monkeypatch):
    """Planted in the arm that passes without it."""
    from ndcheck_kernels.scope import registry

    op = torch.ops.aten.linear.default
    covered_before = registry.covered_ops("cpu")

    def linear(x, weight, bias=None):
        n_parts = 1 + x.numel() // x.shape[-1] % 3
        parts = zip(x.chunk(n_parts, -1), weight.chunk(n_parts, -1), strict=True)
        return sum((a.float() @ b.float().t()).to(x.dtype) for a, b in parts)

    _, clean = measure(sampler, INVARIANT_ALONE)
    assert clean.verdict.outcome == "PASS"
    monkeypatch.setitem(registry._implementations["cpu"], op, linear)
    registry.resolved.clear()
    try:
        _, planted = measure(sampler, INVARIANT_ALONE)
    finally:
        registry.resolved.clear()
    assert registry.covered_ops("cpu") == covered_before
    assert planted.verdict.outcome == "FAIL"


def test_requests_that_never_meet_prove_nothing(open_sampler):
    spec = replace(INVARIANT_ALONE, arrivals="poisson:0.001")
    samples, judgement = measure(open_sampler(arrivals="poisson:0.001"), spec)
    assert {r.witness.achieved_batch_size for r in samples} == {1}
    assert len({r.row_digests for r in samples if r.role != "control"}) == 1
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert "not witnessed at the size asked for" in judgement.verdict.reasons[0]


def test_what_the_invariant_arm_does_not_cover_is_refused(open_sampler):
    with pytest.raises(UsageError, match=r"attention .*layers\.0\.self_attn .*sliding window"):
        sample(open_sampler("gemma3"), Load(2, (0, 1)), arm="invariant")


def test_attention_without_a_paged_form_is_one_line(open_sampler, monkeypatch):
    # It would compile for half a minute, for what is refused anyway.
    monkeypatch.setattr("ndcheck.samplers.local.sampler.examine", lambda *_: None)
    with pytest.raises(UsageError, match="--batching continuous") as caught:
        open_sampler(attention="flex_attention")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arm", ["stock", "invariant"])
def test_a_model_with_attention_of_its_own_is_refused(open_sampler, monkeypatch, arm):
    sampler = open_sampler()
    monkeypatch.setattr(sampler.model, "_can_set_attn_implementation", lambda: False)
    with pytest.raises(UsageError, match="attention of Qwen3ForCausalLM has no paged form"):
        sample(sampler, Load(1), arm=arm)


def test_eager_attention_has_a_paged_form(open_sampler):
    sampler = open_sampler(attention="eager", dtype="fp32")
    (expected,) = sample(open_sampler(dtype="fp32"), Load(1))
    assert {r.token_ids for r in sample(sampler, LOADS[1])} == {expected.token_ids}
    assert sampler._model.config._attn_implementation == "eager"


@pytest.mark.parametrize("load", [Load(1), LOADS[1]])
def test_control_shows_where_it_was_planted(sampler, load):
    clean, faulty = sample(sampler, load), sample(sampler, load, fault=Fault(3, 6))
    for a, b in zip(clean, faulty, strict=True):
        bits = [t for t in range(N_TOKENS) if a.row_digests[t] != b.row_digests[t]]
        tokens = [t for t in range(N_TOKENS) if a.token_ids[t] != b.token_ids[t]]
        assert bits[:2] == [3, 6]
        assert tokens[0] == 6


def test_sampled_completions_depend_on_seed_not_on_load(open_sampler):
    sampler = open_sampler(dtype="fp32")
    decoding = Decoding(N_TOKENS, temperature=1.0, seed=1)
    (alone,) = sample(sampler, Load(1), decoding)
    (exact,) = sample(open_sampler(dtype="fp32", batching="exact"), Load(1), decoding)
    copies = sample(sampler, LOADS[1], decoding)
    (other,) = sample(sampler, Load(1), replace(decoding, seed=2))
    assert {result.token_ids for result in copies} == {alone.token_ids} == {exact.token_ids}
    assert other.token_ids != alone.token_ids


def test_a_probe_leaves_at_its_stop_token_and_others_come(sampler):
    longest = sample(sampler, LOADS[1])[0]
    stop = longest.token_ids[3]
    first_stop = longest.token_ids.index(stop)
    original, sampler._stop_ids = sampler._stop_ids, {stop}
    try:
        ended = sample(sampler, LOADS[1])
    finally:
        sampler._stop_ids = original
    for result in ended:
        assert result.finish_reason == "stop"
        assert result.token_ids == longest.token_ids[: first_stop + 1]
        assert set(result.witness.step_batch_sizes) == {4}


def test_nan_logits_are_a_failed_trial(sampler, monkeypatch):
    head = sampler._model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, out: out * torch.nan)
    try:
        with pytest.raises(TrialError, match="NaN at token 1"):
            sample(sampler, Load(1))
    finally:
        handle.remove()
