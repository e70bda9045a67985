"""The planted fault is caught whatever is drawn, and a fault of the model itself is found."""

from __future__ import annotations

import random
import re
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from ndcheck.analysis.summarising import summarise
from ndcheck.judging.verdict import judge
from ndcheck.records import Decoding, Environment, Probe, Run
from ndcheck.request import DEFAULTS
from ndcheck.runner import plan, run_trials
from ndcheck.samplers.local.faithful import PATHS, examine
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck.storage.run_directory import RunDirectory, SampleReader

SPEC = replace(
    DEFAULTS,
    probes=(Probe("p1", "tell me about the order of a sum"),),
    decoding=Decoding(6),
    batch_sizes=(1, 2, 4),
    n_samples=60,
    arms=("stock",),
    allow_latent=True,
)


@pytest.fixture(scope="module")
def sampler(tiny_models):
    return TransformersSampler(replace(SPEC, model=str(tiny_models["llama"])))


def measure(sampler, path, spec):
    run = Run("r", "0", spec, Environment(), "")
    with closing(RunDirectory.create(path, run)) as directory:
        run = run_trials(plan(spec, sampler), sampler, directory)
    summary = summarise(SampleReader(path), spec)
    return judge(run, summary), summary.probes[0]


# Continuous batching shares the planting, and opening it takes long: two draws of it.
@pytest.mark.parametrize(
    ("batching", "seed"),
    [*(("exact", seed) for seed in range(10)), ("continuous", 0), ("continuous", 1)],
)
def test_the_planted_fault_is_caught_in_every_draw(sampler, tiny_models, tmp_path, seed, batching):
    spec = replace(
        SPEC,
        model=str(tiny_models["llama"]),
        decoding=Decoding(6, temperature=1.0, seed=seed),
        batch_sizes=(1, 2),
        axes=("batch-size",),
        n_samples=6,
        batching=batching,
    )
    if batching == "continuous":
        sampler = TransformersSampler(spec)
    judgement, probe = measure(sampler, tmp_path / "run", spec)
    assert (probe.control.n_caught, probe.control.n_trials) == (1, 1)
    assert judgement.verdict.outcome != "INCONCLUSIVE"


def test_what_a_larger_batch_leaves_behind_is_found(sampler, tmp_path, monkeypatch):
    """A scratch buffer's stale rows: every batch smaller than one before it swaps its top two."""
    forward, largest = sampler._model.forward, [0]

    def stale(*arguments, **options):
        output = forward(*arguments, **options)
        n_rows = output.logits.shape[0]
        if n_rows < largest[0]:
            top = output.logits[:, -1].topk(2).indices
            values = output.logits[:, -1].gather(1, top)
            output.logits[:, -1] = output.logits[:, -1].scatter(1, top, values.flip(1))
        largest[0] = max(largest[0], n_rows)
        return output

    stale.__signature__ = __import__("inspect").signature(forward)
    clean, _ = measure(sampler, tmp_path / "clean", SPEC)
    monkeypatch.setattr(sampler._model, "forward", stale)
    with torch.no_grad():
        judgement, probe = measure(sampler, tmp_path / "stale", SPEC)
    assert judgement.verdict.outcome == "FAIL"
    (verdict,) = judgement.probes
    assert {a for a, v in verdict.axes.items() if v.outcome == "FAIL"} == {"run-to-run"}
    assert clean.verdict.outcome != "FAIL"
    assert probe.n_unique > 1


@pytest.mark.parametrize("seed", range(4))
def test_chance_is_for_the_run_to_find_and_no_reason_to_refuse_a_model(tiny_models, seed):
    """Its own `generate()` does not repeat, so nothing can be said to differ from that."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    draw = random.Random(seed)
    model.lm_head.register_forward_hook(lambda *call: call[-1] * (1 + (draw.random() < 0.3)))
    findings = examine(model, torch.device("cpu"))
    assert not any(findings.reason(path) for path in PATHS)


@pytest.mark.parametrize("offset", [10.0, 1e6])
def test_logits_that_are_all_alike_are_no_reason_to_refuse_a_model(tiny_models, offset):
    """They differ by rounding alone, which is large beside their spread."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight[:1]
        model.lm_head.bias.fill_(offset)
    findings = examine(model, torch.device("cpu"))
    assert not any(findings.reason(path) for path in PATHS)


def wrapped(monkeypatch, model, change):
    """The model's forward with its output ``change``d."""
    forward = model.forward

    def changed(*arguments, **options):
        output = forward(*arguments, **options)
        output.logits = change(output.logits)
        return output

    changed.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(model, "forward", changed)


def test_logits_in_one_buffer_are_those_of_generate(tiny_models, monkeypatch):
    """As a graph's are, which overwrites its output; some give fewer bits than they compute in."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
    buffers = {}

    def reuse(logits):
        buffer = buffers.setdefault(logits.shape, torch.empty_like(logits, dtype=torch.float16))
        return buffer.copy_(logits)

    wrapped(monkeypatch, model, reuse)
    findings = examine(model, torch.device("cpu"))
    assert not any(findings.reason(path) for path in PATHS), findings


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda logits: logits[:, -1], r"\[1, \d+\]"),
        (lambda logits: logits[..., None], r"\[1, 10, \d+, 1\]"),
        (lambda logits: torch.cat((logits, logits)), r"\[2, 10, \d+\]"),
    ],
)
def test_logits_of_another_shape_are_refused_as_such(tiny_models, monkeypatch, change, shape):
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    wrapped(monkeypatch, model, change)
    reason = examine(model, torch.device("cpu")).reason(PATHS[0])
    assert re.search(f"its logits are {shape}, where those of 10 tokens", reason), reason


@pytest.mark.parametrize("error", [KeyError("two"), AssertionError(), StopIteration()])
def test_what_a_model_raises_in_one_batch_is_an_error_of_its_samples(
    tiny_models, tmp_path, monkeypatch, error
):
    sampler = TransformersSampler(replace(SPEC, model=str(tiny_models["llama"])))

    def refuse(logits):
        if len(logits) == 2:
            raise error
        return logits

    wrapped(monkeypatch, sampler.model, refuse)
    judgement, probe = measure(sampler, tmp_path / "run", SPEC)
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert probe.n_errors > 0
    errors = {s.error for s in SampleReader(tmp_path / "run") if s.load.batch_size == 2}
    assert len(errors) == 1
    assert type(error).__name__ in errors.pop()
