"""A failing load becomes its minimum, and a script of some 40 lines shows it."""

from __future__ import annotations

import ast
import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ndcheck.builtin import MODEL_DIRECTORY
from ndcheck.errors import BackendError, UsageError
from ndcheck.explain.failing import Failure, find_failure
from ndcheck.explain.reproduction_script import run_script, write_script
from ndcheck.explain.shrinking import Batch, Shrinker, Shrunk
from ndcheck.records import Decoding, Environment, Load, Probe, Run, Trial
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck.samplers.scripted.sampler import ScriptedSampler
from ndcheck.storage.run_directory import RunDirectory

PROBE = Probe("p1", "tell me about the order")
N_TOKENS = 6


@pytest.fixture(scope="module")
def sampler(tiny_models):
    return TransformersSampler(replace(DEFAULTS, model=str(tiny_models["qwen3"])))


@pytest.fixture
def scripts_start_warm(monkeypatch, warm_python):
    monkeypatch.setattr(sys, "executable", warm_python())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


class Fault(TorchDispatchMode):
    """Turns the logits round at the second token, where the batch has one of ``rows``."""

    def __init__(self, rows, n_vocabulary):
        super().__init__()
        self.rows, self.n_vocabulary, self.n_passes = rows, n_vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.linear.default or result.shape[-1] != self.n_vocabulary:
            return result
        self.n_passes += 1
        return -result if self.n_passes >= 2 and result.shape[0] in self.rows else result


def failure(load, slot, decoding=None):
    decoding = decoding or Decoding(N_TOKENS)
    spec = replace(DEFAULTS, probes=(PROBE,), decoding=decoding)
    trial = Trial(1, "stock", "p1", "neighbours", load, 1)
    samples = ScriptedSampler("clean").sample(trial, PROBE, decoding)
    sample = samples[load.slots.index(slot)]
    return Failure(Run("r", "0", spec, Environment(), ""), PROBE, sample, 1, 1, False)


def shrinker(sampler, load, rows, slot):
    @contextlib.contextmanager
    def kernels():
        with Fault(rows, sampler.model.config.vocab_size):
            yield

    return Shrinker(sampler, failure(load, slot), kernels)


FAILING = {2: range(2, 17), 5: (5, 16), 4: range(4, 17, 4), 12: range(12, 17)}


@pytest.mark.parametrize("rows", FAILING)
def test_sixteen_rows_become_the_fewest_that_fail(sampler, rows):
    load = Load(16, (9,), tuple(range(1, 16)), 3, "chunked")
    shrunk = shrinker(sampler, load, FAILING[rows], 9).shrink()
    assert len(shrunk.batch.rows) == rows
    assert shrunk.batch.size == (rows, rows - 1)  # one token in every other row
    assert list(shrunk.batch.probe) == sampler._prompts.encode(PROBE.prompt)
    assert shrunk.batch.cache_state == "whole"
    assert (shrunk.position, shrunk.batch.n_tokens) == (1, 2)
    assert shrunk.token_alone != shrunk.token_batched
    assert shrunk.before.size[0] == 16


def test_a_failure_that_does_not_come_again_is_an_error(sampler):
    with pytest.raises(BackendError, match="does not differ here"):
        shrinker(sampler, Load(2, (0, 1)), (), 0).shrink()
    with pytest.raises(UsageError, match="greedy"):
        Shrinker(sampler, failure(Load(1), 0, Decoding(3, 0.7)))


@pytest.mark.usefixtures("scripts_start_warm")
@pytest.mark.parametrize("state", ["whole", "chunked", "prefix"])
def test_the_script_is_short_and_its_tokens_are_the_samplers(tmp_path: Path, state):
    """On a batch that does not fail: it must say so, and give the tokens that the sampler gives."""
    sampler = TransformersSampler(DEFAULTS)
    encode = sampler._prompts.encode
    rows = (tuple(encode("class Queue:")), tuple(encode("import os\n")))
    batch = Batch(rows, 0, state, 5)
    tracer = Shrinker(sampler, failure(Load(1), 0))
    shrunk = Shrunk(batch, batch, 3, 1, 2, False, 1, tracer._pass_lengths(batch))
    text = write_script(shrunk, sampler.describe(), str(MODEL_DIRECTORY), remote=False)
    assert len(text.splitlines()) < (58 if state == "prefix" else 41)
    assert "ndcheck" not in "".join(
        ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)
    )
    path = tmp_path / "repro.py"
    path.write_text(text)
    shown = run_script(path, shrunk)
    alone, batched = (
        [token for token, _ in tracer._completion(batch, alone=alone)] for alone in (True, False)
    )
    assert f"alone   {alone}" in shown.output
    assert f"batched {batched}" in shown.output
    # Token 4 was claimed to differ; the script is believed, not the claim.
    assert shown.shows_it == (alone[:4] != batched[:4] and alone[:3] == batched[:3])


@pytest.mark.usefixtures("scripts_start_warm")
def test_a_script_makes_random_weights_itself(tmp_path: Path, tiny_models):
    source = str(tiny_models["qwen3"])
    spec = replace(DEFAULTS, model=source, random_weights=7, dtype="fp32")
    sampler = TransformersSampler(spec)
    batch = Batch(((5, 6, 7), (8, 9)), 0, "whole", 3)
    shrunk = Shrunk(batch, batch, 0, 1, 2, False, 1, (3,))
    text = write_script(shrunk, sampler.describe(), source, remote=False, random_weights=7)
    assert len(text.splitlines()) < 45
    path = tmp_path / "repro.py"
    path.write_text(text)
    alone = Shrinker(sampler, failure(Load(1), 0))._completion(batch, alone=True)
    assert f"alone   {[token for token, _ in alone]}" in run_script(path, shrunk).output


def test_what_an_op_can_be_blamed_for_is_explained(tmp_path: Path):
    """A prefix whose tokens part beside a batch where bits alone do: the batch is taken."""
    loads = [Load(1), Load(1, cache_state="prefix"), Load(2, (0, 1))]
    run = store(tmp_path / "both", "cache-dependent", loads, {2: "latent"})
    assert find_failure(run, None).sample.load.batch_size == 2
    assert find_failure(run, None).is_latent
    alone = store(tmp_path / "alone", "cache-dependent", loads[:2])
    assert find_failure(alone, None).sample.load.cache_state == "prefix"


def store(path, behaviour, loads, others=None):
    decoding = Decoding(8)
    probe = DEFAULTS.probes[0]
    spec = replace(DEFAULTS, model=f"scripted:{behaviour}", decoding=decoding)
    directory = RunDirectory.create(path, Run("r", "0", spec, Environment(), ""))
    first = 0
    for trial_id, load in enumerate(loads):
        sampler = ScriptedSampler((others or {}).get(trial_id, behaviour))
        axis = "batch-size" if trial_id else "reference"
        trial = Trial(trial_id, "stock", probe.probe_id, axis, load, first)
        directory.append(sampler.sample(trial, probe, decoding))
        first += trial.n_samples
    directory.close()
    return path


def test_the_failure_in_the_smallest_batch_is_chosen(tmp_path: Path):
    loads = [Load(1), Load(8, tuple(range(8))), Load(3, (0, 1, 2))]
    run = store(tmp_path / "forked", "batch-dependent", loads)
    found = find_failure(run, None)
    assert (found.sample.load.batch_size, found.position, found.is_latent) == (3, 3, False)
    assert find_failure(run, 2).sample.load.batch_size == 8
    latent = find_failure(store(tmp_path / "latent", "latent", loads), None)
    assert (latent.position, latent.is_latent) == (2, True)
    for sample_id, message in ((0, "of its reference"), (99, "no such sample")):
        with pytest.raises(UsageError, match=message):
            find_failure(run, sample_id)
    with pytest.raises(UsageError, match="no sample differs"):
        find_failure(store(tmp_path / "clean", "clean", loads), None)
