"""A step that cannot be captured whole is never replayed: CUDA graphs played on a CPU."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from ndcheck.records import Decoding, Fault, Load, Probe, Trial
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.batch import ExactBatch
from ndcheck.samplers.local.decoding import replaying, steps
from ndcheck.samplers.local.sampler import TransformersSampler

PROBE = Probe("p1", "tell me about the order of a sum")
N_TOKENS = 10
GREEDY = Decoding(N_TOKENS)
LOADS = [Load(1), Load(3, (0, 1, 2)), Load(3, (1,), (30, 4), 7)]


class PlayedGraph:
    """Replays what was captured; of a capture that failed what came before, which is no step."""

    ends_broken = False

    def __init__(self):
        self.body = lambda: None

    def replay(self):
        self.body()

    def pool(self):
        if self.ends_broken:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")


@pytest.fixture
def played(monkeypatch):
    """CUDA's part in `Replayed`, on a CPU: a capture runs nothing, a replay runs the pass."""
    left = []

    @contextmanager
    def capture(graph, pool=None):
        kept = [part.clone() for part in state(capture.steps)]
        work, batch = capture.replayed._work, capture.steps.batch
        try:
            yield
        finally:
            for part, value in zip(state(capture.steps), kept, strict=True):
                part.copy_(value)

        def body():
            with batch.uncounted():
                work()

        graph.body = body

    def state(decode_steps):
        batch = decode_steps.batch
        layers = [(x.keys, x.values, x.cumulative_length) for x in batch.cache.layers]
        yield from (decode_steps._position, decode_steps._next_ids, *decode_steps._log)
        yield batch._next_positions
        for layer in layers:
            yield from layer

    def remember(owner, name, method):
        own = getattr(owner, method)

        def remembering(self, *args, **kwargs):
            setattr(capture, name, self)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, remembering)

    for method in ("__init__", "run", "feed"):
        remember(steps.DecodeSteps, "steps", method)
    remember(replaying.Replayed, "replayed", "replay")
    monkeypatch.setattr(ExactBatch, "can_be_captured", True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PlayedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: torch.Stream(device="cpu"))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: left.append("stream"))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *_, name=name: left.append(name), raising=False)
    return left


@pytest.fixture
def sampler(tiny_models):
    return TransformersSampler(replace(DEFAULTS, model=str(tiny_models["qwen3"]), device="cpu"))


def run(sampler, load, decoding=GREEDY):
    trial = Trial(0, "stock", "p1", "slot", load, 0)
    samples = sampler.sample(trial, PROBE, decoding)
    return [(s.token_ids, s.row_digests, s.witness) for s in samples]


def test_replayed_steps_are_the_steps(sampler, played, monkeypatch):
    captured = [run(sampler, load) for load in (*LOADS, *LOADS)]
    assert len(sampler._captured) == len(LOADS)
    sampler._captured.clear()
    monkeypatch.setattr(ExactBatch, "can_be_captured", False)
    assert captured == [run(sampler, load) for load in (*LOADS, *LOADS)]


FED = [Load(1, width=2), Load(3, (0, 1, 2), width=3), Load(3, (1,), (30, 4), 7, width=2)]
FED += [Load(3, (1,), (30, 4), 7, "chunked", cut=2, scores=True)]


def fed(sampler, load, fault=None):
    trial = Trial(0, "invariant", "p1", "width", load, 0, fault=fault)
    samples = sampler.sample(trial, PROBE, Decoding(18))
    # On a CPU, where Python launches a pass, it reads one position after the other.
    witnesses = [replace(sample.witness, override_fires=None) for sample in samples]
    read = [(s.token_ids, s.logprobs, s.row_digests, s.fed) for s in samples]
    return list(zip(read, witnesses, strict=True))


@pytest.mark.parametrize("load", FED)
def test_replayed_passes_are_the_passes(sampler, played, monkeypatch, load):
    """All passes of a size but the first are replayed, and what follows them goes on from there."""
    sizes = []
    own = replaying.Replayed.replay

    def note(self):
        sizes.append(self._n_columns)
        return own(self)

    monkeypatch.setattr(replaying.Replayed, "replay", note)
    fed(sampler, load)  # Decodes what the others find, and feed.
    sizes.clear()
    captured = fed(sampler, load)
    width = load.cut or load.width
    assert sizes.count(width) >= 17 // width - 1 > 0
    assert not any(fed.n_other_bits or fed.n_other_tokens for (*_, fed), _ in captured)
    sampler._captured.clear()
    monkeypatch.setattr(ExactBatch, "can_be_captured", False)
    assert captured == fed(sampler, load)


def count_fires(sampler, load):
    trial = Trial(0, "invariant", "p1", "width", load, 0)
    sampler._captured.clear()
    return {s.witness.override_fires for s in sampler.sample(trial, PROBE, Decoding(18))}


@pytest.mark.parametrize("error", [RuntimeError("cannot be captured"), torch.OutOfMemoryError()])
def test_passes_that_cannot_be_captured_are_launched(sampler, played, monkeypatch, caplog, error):
    """The steps before them were, so nothing is said of this; what they tried did not fire."""
    expected = [fed(sampler, load) for load in FED]
    with monkeypatch.context() as launched:
        launched.setattr(ExactBatch, "can_be_captured", False)
        n_fires = [count_fires(sampler, load) for load in FED]
    original = torch.cuda.graph

    @contextmanager
    def capture(graph, pool=None):
        with original(graph, pool):
            yield
            if original.replayed._n_columns > 1:
                raise error

    monkeypatch.setattr(torch.cuda, "graph", capture)
    assert n_fires == [count_fires(sampler, load) for load in FED]
    assert expected == [fed(sampler, load) for load in FED]
    assert not caplog.records


@pytest.mark.parametrize("folder", ["torch", "venv"])
def test_a_failed_capture_names_a_line_wherever_the_project_is(tmp_path, folder):
    file = tmp_path / folder / "model.py"
    scope = {}
    exec(compile("def forward():\n    raise ValueError('no')", file, "exec"), scope)
    with pytest.raises(ValueError, match="no") as raised:
        scope["forward"]()
    assert replaying._where(raised.value).startswith("model.py, line 2")


def test_a_fault_in_a_pass_is_planted_uncaptured(sampler, played, monkeypatch):
    fed(sampler, FED[0])
    seen = fed(sampler, FED[0], Fault(3, 9))
    assert seen[0][0][3].n_other_tokens > 0
    monkeypatch.setattr(ExactBatch, "can_be_captured", False)
    assert seen == fed(sampler, FED[0], Fault(3, 9))


def test_what_was_captured_draws_for_no_other_decoding(sampler, played, monkeypatch):
    """A batch of the same shape, kept from another seed, temperature or length."""
    decodings = [Decoding(N_TOKENS, *drawn) for drawn in ((), (1.0, 1), (1.0, 2))]
    asked = [(Load(2, (0,), (40,)), decoding) for decoding in decodings]
    asked.append((Load(2, (0,), (39,)), Decoding(N_TOKENS + 1)))
    captured = [run(sampler, *each) for each in asked]
    sampler._captured.clear()
    monkeypatch.setattr(ExactBatch, "can_be_captured", False)
    assert captured == [run(sampler, *each) for each in asked]
    assert len({tokens for ((tokens, *_),) in captured[:3]}) == 3


@pytest.mark.parametrize("ends_broken", [False, True])
def test_a_step_that_cannot_be_captured_runs_uncaptured(
    sampler, played, monkeypatch, caplog, ends_broken
):
    """Twice the same shape: the second trial finds what the first one left."""
    stock = ExactBatch.step
    is_capturing = False
    original = torch.cuda.graph

    @contextmanager
    def capture(graph, pool=None):
        nonlocal is_capturing
        with original(graph, pool):
            is_capturing = True
            try:
                yield
            except RuntimeError as error:
                if ends_broken:
                    raise torch.AcceleratorError(
                        "operation failed due to a previous error"
                    ) from error
                raise
            finally:
                is_capturing = False

    def step(self, token_ids):
        logits = stock(self, token_ids)
        if is_capturing:
            raise RuntimeError("Cannot copy between CPU and CUDA tensors")
        return logits

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(PlayedGraph, "ends_broken", ends_broken)
    monkeypatch.setattr(ExactBatch, "step", step)
    with caplog.at_level(logging.WARNING, logger="ndcheck"):
        seen = [run(sampler, load) for load in (*LOADS, *LOADS)]
    monkeypatch.setattr(ExactBatch, "can_be_captured", False)
    assert seen == [run(sampler, load) for load in (*LOADS, *LOADS)]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("stock: a decode step cannot be captured as a CUDA graph")
    assert "Cannot copy between CPU and CUDA tensors" in said
    assert "test_steps.py, line" in said
    assert "\n" not in said
    expected = ["stream", "_cuda_endAllocateToPool", "_cuda_releasePool"]
    assert played == (expected if ends_broken else [])


def test_memory_that_runs_out_in_a_capture_halves_the_batch(sampler, played, monkeypatch):
    original = torch.cuda.graph

    @contextmanager
    def capture(graph, pool=None):
        with original(graph, pool):
            yield
            if capture.original.steps.batch.n_rows > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

    capture.original = original
    monkeypatch.setattr(torch.cuda, "graph", capture)
    samples = run(sampler, LOADS[1])
    assert {witness.out_of_memory_at for _, _, witness in samples} == {2}
