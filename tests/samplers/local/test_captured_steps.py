"""On a GPU: a captured step gives the tokens and the bits of the uncaptured one, in both arms.

With every attention both are the tokens of `generate()`, and what cannot be captured runs so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ndcheck.analysis.summarising import summarise
from ndcheck.errors import UsageError
from ndcheck.plan.faults import plant_fault
from ndcheck.plan.trials import plan_trials
from ndcheck.records import Decoding, Load, Probe, Trial
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.decoding.replaying import Replayed
from ndcheck.samplers.local.sampler import TransformersSampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROBE = Probe("p1", "Tell me about Richard Feynman")


def sampler_spec(directory):
    return replace(DEFAULTS, model=str(directory), device="cuda", random_weights=0)


SHAPES = Path(__file__).parents[3] / "kernels" / "bench" / "shapes"


@pytest.fixture(scope="module", params=["attention", "hybrid"])
def sampler(request, qwen3_shape):
    shape = qwen3_shape if request.param == "attention" else SHAPES / "tiny-hybrid"
    return TransformersSampler(sampler_spec(shape))


def run(sampler, arm, load, decoding):
    length = len(load.slots)
    return sampler.sample(Trial(0, arm, "p1", "neighbours", load, 0), PROBE, decoding)[:length]


LOADS = [
    Load(1),
    Load(4, tuple(range(4))),
    Load(3, (1,), (40, 7), 5),
    Load(3, (2,), (40, 7), 5, "chunked"),
    Load(2, (0,), (30,), 5, "prefix"),
]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("arm", ["stock", "invariant"])
def test_captured_and_uncaptured_steps_agree(sampler, monkeypatch, arm, temperature):
    decoding = Decoding(70, temperature)
    captured = [run(sampler, arm, load, decoding) for load in LOADS]
    again = [run(sampler, arm, load, decoding) for load in LOADS]
    assert sampler._captured
    assert not sampler._uncaptured
    sampler._captured.clear()
    monkeypatch.setattr(ExactBatch, "can_be_captured", False)
    plain = [run(sampler, arm, load, decoding) for load in LOADS]
    for rows in zip(captured, again, plain, strict=True):
        for one, two, three in zip(*rows, strict=True):
            for name in ("token_ids", "logprobs", "margins", "row_digests", "witness"):
                assert getattr(one, name) == getattr(two, name) == getattr(three, name), name
    sampler._captured.clear()


FED = [replace(load, width=width) for load in LOADS[:3] for width in (2, 5)]
FED += [replace(LOADS[2], cache_state="chunked", cut=3, scores=True)]


@pytest.mark.parametrize("arm", ["stock", "invariant"])
def test_captured_and_launched_passes_agree(sampler, monkeypatch, arm):
    """Of several tokens: states beside the cache take columns of the mask, so there all launch."""
    n_replayed = 0
    own = Replayed.replay

    def count(self):
        nonlocal n_replayed
        n_replayed += self._n_columns > 1
        return own(self)

    monkeypatch.setattr(Replayed, "replay", count)
    decoding = Decoding(41)
    for load in FED:
        run(sampler, arm, load, decoding)  # Decodes what the others find, and feed.
    n_replayed = 0
    captured = [run(sampler, arm, load, decoding) for load in FED]
    has_states = any(steps.batch._has_states for steps in sampler._captured.values())
    at_least = sum(40 // (load.cut or load.width) - 1 for load in FED)
    assert n_replayed == 0 if has_states else n_replayed >= at_least
    monkeypatch.setattr(ExactBatch, "can_capture_passes", False)
    launched = [run(sampler, arm, load, decoding) for load in FED]
    for rows in zip(captured, launched, strict=True):
        for one, two in zip(*rows, strict=True):
            for name in ("token_ids", "logprobs", "margins", "row_digests", "fed"):
                assert getattr(one, name) == getattr(two, name), name
            assert one.witness.decode_calls == two.witness.decode_calls
            assert one.witness.prefill_calls == two.witness.prefill_calls
            assert one.witness.override_fires == two.witness.override_fires
            assert arm == "stock" or (one.fed.n_other_bits, one.fed.n_other_tokens) == (0, 0)
    sampler._captured.clear()
    sampler._completions.clear()


def generate(sampler, load, n_tokens):
    rows = sampler.rows(load, PROBE)
    width = max(map(len, rows))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in rows], device="cuda")
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device="cuda")
    done = sampler.model.generate(
        padded, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, pad_token_id=0
    )
    return [tuple(done[slot, width:].tolist()) for slot in load.slots]


# Compiling flex attention, torch and transformers call what torch is about to drop.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_every_attention_gives_the_tokens_of_generate(qwen3_shape, monkeypatch, attention):
    """In fp32: twice a shape, since the second trial finds what the first one left.

    Flex attention and its mask are compiled for 8 lengths, and traced anew for every other one.
    """
    is_flex = attention == "flex_attention"
    if is_flex:
        # Processes to compile in would take longer to start.
        monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    spec = sampler_spec(SHAPES / "tiny" if is_flex else qwen3_shape)
    spec = replace(spec, attention=attention, dtype="fp32", arms=("stock",))
    try:
        sampler = TransformersSampler(spec)
    except UsageError as error:
        assert is_flex, error  # noqa: PT017  the others are accepted
        pytest.skip(f"refused by name: {error}")
    decoding = Decoding(5 if is_flex else 24)
    loads = LOADS[2:3] if is_flex else LOADS[:3]
    right = [generate(sampler, load, decoding.max_tokens) for load in loads] * 2
    loads *= 2
    captured = [run(sampler, "stock", load, decoding) for load in loads]
    sampler._captured.clear()
    monkeypatch.setattr(ExactBatch, "can_be_captured", False)
    plain = [run(sampler, "stock", load, decoding) for load in loads]
    for tokens, ours, theirs in zip(right, captured, plain, strict=True):
        assert [sample.token_ids for sample in ours] == tokens
        assert [sample.token_ids for sample in theirs] == tokens
        # With that, it takes other kernels.
        if not is_flex:
            assert [s.row_digests for s in ours] == [s.row_digests for s in theirs]


UNCAPTURED = {
    "reads back": lambda logits: float(logits[0, 0, 0].item()) * 0,
    "makes a scalar on the host": lambda logits: torch.tensor(0.0, device=logits.device),
    "counts what is not zero": lambda logits: logits[0, 0].nonzero().shape[0] * 0,
    "waits for the device": lambda logits: torch.cuda.synchronize() or 0,
}


@pytest.mark.parametrize("what", UNCAPTURED)
def test_an_op_that_cannot_be_captured_runs_uncaptured(qwen3_shape, monkeypatch, caplog, what):
    """And leaves torch able to capture: the other arm, and other samplers, still do."""
    sampler = TransformersSampler(replace(sampler_spec(qwen3_shape), arms=("stock", "invariant")))
    decoding = Decoding(12)
    expected = [run(sampler, "stock", load, decoding) for load in LOADS]
    sampler._captured.clear()

    def interfere(model, args, output):
        output.logits = output.logits + UNCAPTURED[what](output.logits)
        return output

    hook = sampler.model.register_forward_hook(interfere)
    with caplog.at_level("WARNING", logger="ndcheck"):
        seen = [run(sampler, "stock", load, decoding) for load in (*LOADS, *LOADS)]
    hook.remove()
    for ours, right in zip(seen, [*expected, *expected], strict=True):
        assert [s.token_ids for s in ours] == [s.token_ids for s in right]
        assert [s.witness for s in ours] == [s.witness for s in right]
    (said,) = [r.getMessage() for r in caplog.records if "captured" in r.getMessage()]
    assert "test_captured_steps.py, line" in said
    sampler._captured.clear()
    sampler._uncaptured.clear()
    torch.cuda.empty_cache()
    for load, right in zip(LOADS, expected, strict=True):
        again = run(sampler, "stock", load, decoding)
        assert [s.row_digests for s in again] == [s.row_digests for s in right]
    assert all(steps._replayed._graph is not None for steps in sampler._captured.values())
    assert run(sampler, "invariant", Load(1), decoding)


@pytest.mark.parametrize("sampler", ["attention"], indirect=True)
def test_the_invariant_arm_is_and_stock_is_not_invariant(sampler):
    spec = replace(
        DEFAULTS,
        probes=(PROBE,),
        decoding=Decoding(120),
        batch_sizes=(1, 2, 5, 16, 64),
        n_samples=400,
        arms=("stock", "invariant"),
    )
    lengths = {"p1": sampler.count_tokens(PROBE.prompt)}
    samples, n_tokens = [], {}
    for trial in plan_trials(spec, lengths, sampler.context):
        fault = plant_fault(n_tokens[trial.baseline]) if trial.role == "control" else None
        found = sampler.sample(replace(trial, fault=fault), PROBE, spec.decoding)
        n_tokens[trial.trial_id] = len(found[0].token_ids)
        samples += found
    arms = {probe.arm: probe for probe in summarise(samples, spec).probes}
    assert arms["stock"].n_unique > 1
    assert arms["invariant"].n_unique == 1
    assert not any(s.error for s in samples)
    # One each of what is decoded, fed in passes of several tokens, and scored.
    controls = {name: (arm.control.n_caught, arm.control.n_trials) for name, arm in arms.items()}
    assert controls == dict.fromkeys(arms, (3, 3))
    assert all(s.witness.override_fires for s in samples if s.arm == "invariant")


def test_arms_take_turns_on_graphs_captured_before(qwen3_shape):
    """The invariant arm joins weights; a stock graph that holds their old place reads waste."""
    spec = replace(sampler_spec(qwen3_shape), arms=("stock", "invariant"))
    fresh = TransformersSampler(spec)
    decoding = Decoding(40)
    first = [run(fresh, arm, Load(2, (0, 1)), decoding) for arm in ("stock", "invariant")]
    torch.empty(1 << 28, device="cuda").fill_(torch.nan)
    again = [run(fresh, arm, Load(2, (0, 1)), decoding) for arm in ("stock", "invariant")]
    assert [[s.row_digests for s in rows] for rows in first] == [
        [s.row_digests for s in rows] for rows in again
    ]
