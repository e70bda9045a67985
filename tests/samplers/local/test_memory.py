"""What fits: an estimate from model and machine; a batch too large is halved, and said so."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ndcheck.analysis.summarising import summarise
from ndcheck.errors import TrialError
from ndcheck.judging.verdict import judge
from ndcheck.plan.faults import plant_fault
from ndcheck.plan.trials import plan_trials
from ndcheck.records import Decoding, Environment, Load, Probe, Run, Trial
from ndcheck.request import DEFAULTS
from ndcheck.runner import fit_spec
from ndcheck.samplers.local import following, memory
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.continuous import ContinuousBatch
from ndcheck.samplers.local.sampler import TransformersSampler
from ndcheck.samplers.scripted.sampler import ScriptedSampler

CPU = torch.device("cpu")
PROBE = Probe("p1", "tell me about the order of a sum")
GREEDY = Decoding(8)
SPEC = replace(
    DEFAULTS, probes=(PROBE,), decoding=GREEDY, device="cpu", arms=("invariant",), n_samples=20
)


@pytest.fixture(scope="module", params=["exact", "continuous"])
def sampler(tiny_models, request):
    return TransformersSampler(
        replace(SPEC, model=str(tiny_models["qwen3"]), batching=request.param)
    )


@pytest.fixture
def room(monkeypatch):
    """``room(n)``: no batch of more than n rows fits."""

    def limit(n):
        for batch, argument in ((ExactBatch, 3), (ContinuousBatch, 4)):
            original = batch.__init__

            def init(self, *args, original=original, argument=argument):
                if args[argument - 1] > n:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
                original(self, *args)

            monkeypatch.setattr(batch, "__init__", init)

    return limit


def sample(sampler, load):
    return sampler.sample(Trial(0, "invariant", "p1", "slot", load, 0), PROBE, GREEDY)


@pytest.mark.parametrize("load", [Load(6, tuple(range(6)), filler_seed=1), Load(6, (5,), (9,) * 5)])
def test_a_batch_that_does_not_fit_is_halved_and_the_witness_says_so(sampler, room, load):
    whole = sample(sampler, load)
    room(2)
    halved = sample(sampler, load)
    assert [r.slot for r in halved] == [r.slot for r in whole]
    assert {r.witness.achieved_batch_size for r in whole} == {6}
    assert {r.witness.out_of_memory_at for r in whole} == {None}
    assert {r.witness.achieved_batch_size for r in halved} == {2}
    assert {r.witness.out_of_memory_at for r in halved} == {3}
    assert {r.row_digests for r in whole} == {r.row_digests for r in halved}
    assert all(r.witness.override_fires for r in halved)


def test_not_even_one_row_fits(sampler, room):
    room(0)
    with pytest.raises(TrialError, match="out of memory at batch size 4, and at 1, on cpu"):
        sample(sampler, Load(4, (0, 1, 2, 3), filler_seed=1))


def test_batches_that_did_not_form_prove_nothing(sampler, room):
    """The control: the same plan passes where they do form."""
    outcomes = []
    spec = replace(SPEC, batch_sizes=(4,), axes=("batch-size", "slot"), n_samples=8)
    trials = plan_trials(spec, {"p1": sampler.count_tokens(PROBE.prompt)}, sampler.context)
    for n_rows in (4, 2):
        room(n_rows)
        samples = []
        for trial in trials:
            fault = plant_fault(8) if trial.role == "control" else None
            samples += sampler.sample(replace(trial, fault=fault), PROBE, GREEDY)
        run = Run("r", "0", spec, Environment(), "", "finished")
        outcomes.append(judge(run, summarise(samples, spec)).verdict.outcome)
    assert outcomes == ["PASS", "INCONCLUSIVE"]


def test_a_failure_that_is_not_of_memory_is_not_halved(sampler, monkeypatch):
    calls = []

    def fail(self, *args, **kwargs):
        calls.append(1)
        raise RuntimeError("some kernel is broken")

    for batch in (ExactBatch, ContinuousBatch):
        monkeypatch.setattr(batch, "__init__", fail)
    with pytest.raises(TrialError, match="some kernel is broken"):
        sample(sampler, Load(4, (0, 1, 2, 3)))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert memory.is_out_of_memory(error) is expected


def test_more_memory_holds_more_rows_within_reason(sampler, monkeypatch):
    found = []
    per_row = memory.bytes_per_row(sampler._model, CPU, 10, 18)
    for n_rows in (0, 1, 5, 10, 10**6):
        monkeypatch.setattr(memory, "free_bytes", lambda device, n=n_rows: int(1.3 * n * per_row))
        found.append(memory.largest_batch_size(sampler._model, CPU, 10, 18, lambda n: None))
    assert found == [1, 1, 5, 10, memory.MOST_ROWS["cpu"]]


def test_a_row_is_charged_with_its_cache(sampler):
    """Two layers of keys and values, 2 heads of 16, bf16, for each column more."""
    short, long = (memory.bytes_per_row(sampler._model, CPU, 4, width) for width in (32, 64))
    assert long - short == 32 * 2 * 2 * 2 * 16 * 2


def test_a_device_has_the_last_word(sampler, monkeypatch):
    tried = []

    def try_rows(n_rows):
        tried.append(n_rows)
        if n_rows > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**15)
    monkeypatch.setattr(memory, "bytes_per_row", lambda *args: 1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    device = torch.device("cuda")
    assert memory.largest_batch_size(sampler._model, device, 10, 18, try_rows) == 8
    assert tried == [512, 256, 128, 64, 32, 16, 8]


def test_the_machine_has_free_memory():
    assert memory.free_bytes(CPU) > 1 << 20


@pytest.mark.parametrize(
    ("behaviour", "sizes"), [("clean", (1, 2, 4, 8, 16)), ("out-of-memory", (1, 2, 3))]
)
def test_auto_loads_go_up_to_the_largest(behaviour, sizes):
    auto = replace(SPEC, batch_sizes=())
    assert fit_spec(auto, ScriptedSampler(behaviour)).batch_sizes == sizes
    assert fit_spec(SPEC, ScriptedSampler(behaviour)) == SPEC


def test_auto_loads_of_a_model(sampler):
    fitted = fit_spec(replace(SPEC, batch_sizes=()), sampler)
    assert fitted.batch_sizes[:2] == (1, 2)
    assert fitted.batch_sizes[-1] <= memory.MOST_ROWS["cpu"]


def test_ranks_keep_no_batch_whose_room_the_next_one_needs(monkeypatch):
    """Qwen3-235B in FP8 on two H200 leaves 28 GiB a card: 122 rows stayed beside 121, and it ended.

    Its cache is 94 layers of two heads a rank, keys and values of 128 numbers in 16 bits.
    """

    def batch(rows):
        cell = torch.empty(rows, 94 * 2, 1011, 128, dtype=torch.bfloat16, device="meta")
        layer = SimpleNamespace(keys=cell, values=cell)
        return SimpleNamespace(batch=SimpleNamespace(cache=SimpleNamespace(layers=[layer])))

    monkeypatch.setattr(following, "free_bytes", lambda device: 28 << 30)
    monkeypatch.setattr(following.dist, "all_gather", lambda others, own: others[0].copy_(own))
    ranks = object.__new__(following.Ranks)
    ranks._device, ranks._room, ranks.size = torch.device("cpu"), None, 1
    kept = {("invariant", None, rows, 1011): batch(rows) for rows in (1, 8, 122)}
    ranks.make_room(kept, 8 * 1011)
    assert [rows for _, _, rows, _ in kept] == [1, 8, 122]  # 139 rows of 97 MB in half of it
    ranks.make_room(kept, 121 * 1011)
    assert not kept
