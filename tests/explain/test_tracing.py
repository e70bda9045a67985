"""Guilty ops are named, with the reason; innocent ones are not."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from ndcheck.errors import UsageError
from ndcheck.explain.advice import advise, spans
from ndcheck.explain.swapping import find_swaps
from ndcheck.explain.traced import group_findings
from ndcheck.explain.tracing import Tracer
from ndcheck.records import Decoding, Load, Probe
from ndcheck.reports.explain.trace import Explanation, trace_document, trace_lines
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.sampler import TransformersSampler

PROBE = Probe("p1", "tell me about the order")


class Planted(torch.nn.Module):
    def __init__(self, inner, op):
        super().__init__()
        self.inner, self.op = inner, op

    def forward(self, x):
        return self.op(self.inner(x))


@pytest.fixture(scope="module")
def sampler(tiny_models):
    return TransformersSampler(replace(DEFAULTS, model=str(tiny_models["qwen3"])))


@pytest.fixture
def planted_sampler(sampler, planted_ops):
    """A model with a planted op after the last norm and a clean one after the first MLP."""
    decoder = sampler.model.model
    norm, mlp = decoder.norm, decoder.layers[0].mlp

    def plant(name):
        decoder.norm = Planted(norm, getattr(planted_ops, name))
        decoder.layers[0].mlp = Planted(mlp, planted_ops.clean)
        return sampler

    yield plant
    decoder.norm, decoder.layers[0].mlp = norm, mlp


def mixed(sampler, size, extra=0):
    """The probe in the middle of fillers, longer by ``extra``."""
    length = sampler.count_tokens(PROBE.prompt)
    return Load(size, (size // 2,), (length + extra,) * (size - 1), 7)


def trace(sampler, sizes, step=1, arm="invariant", extra=0):
    tracer = Tracer(sampler, PROBE, step, arm)
    alone = tracer.record_alone()
    return [tracer.trace(mixed(sampler, n, extra), n // 2, alone) for n in sizes]


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize(
    ("name", "cause", "sizes", "classes"),
    [
        ("follows_rows", "shape", (2, 3, 4, 6), "1-3 | 4-6"),
        # What the neighbour holds at 2 and at 3 rows may differ, so those may be one class or two.
        ("reads_neighbour", "neighbours", (2, 3), "1 | "),
        ("spoils_later_rows", "place", (2, 3, 4), "1 | 2-4"),
    ],
)
def test_planted_ops_alone_are_guilty(planted_sampler, step, name, cause, sizes, classes):
    traces = trace(planted_sampler(name), sizes, step)
    guilty = [group for group in group_findings(traces) if group.introduces]
    assert [(group.op, group.module, group.cause) for group in guilty] == [
        (name, "model.norm", cause)
    ]
    assert spans(guilty[0].bit_classes).startswith(classes)
    assert all(trace.doubt is None for trace in traces)
    assert traces[-1].first_difference.op == name
    assert traces[-1].logits_differ
    (sentence,) = advise(group_findings(traces), traces, None)
    assert name in sentence
    assert ("neighbours" in sentence) == (cause == "neighbours")
    assert ("follows the row's place" in sentence) == (cause == "place")
    assert ("follows the batch size" in sentence) == (cause == "shape")


def test_an_op_of_the_model_itself_is_not_called_unseen(sampler, monkeypatch):
    """What is in no layer is compared in no module: it ran otherwise, which torch does see."""
    forward = type(sampler.model).forward

    @functools.wraps(forward)
    def scaled_in_batches(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if len(out.logits) > 1:
            out.logits = out.logits * 1.25
        return out

    assert trace(sampler, (2,))[0].n_not_compared == 0
    monkeypatch.setattr(type(sampler.model), "forward", scaled_in_batches)
    (found,) = trace(sampler, (2,))
    assert found.logits_differ
    assert found.introducers == []
    assert "1 op ran otherwise alone" in found.doubt


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("step", [0, 2])
def test_invariant_kernels_are_clean(sampler, step, extra):
    for found in trace(sampler, (2, 5), step, extra=extra):
        assert found.doubt is None
        assert not found.logits_differ
        assert {finding.status for finding in found.findings} == {"clean"}
        assert len(found.findings) > 50


def test_stock_findings_agree_with_the_bits_of_the_logits(sampler):
    """Whatever this machine's kernels do: logits differ at the first step only through an op."""
    for found in trace(sampler, (2, 4, 16), 0, "stock", extra=3):
        assert found.doubt is None
        if found.logits_differ:
            assert found.introducers
            assert found.first_difference is not None


def test_swapping_finds_what_is_needed_and_no_more(planted_sampler):
    """The planted op has an invariant implementation; whatever else is guilty here, has one too."""
    sampler = planted_sampler("curable")
    traces = trace(sampler, (2, 5), 1, "stock")
    groups = group_findings(traces)
    guilty = [(group.op, group.module) for group in groups if group.introduces]
    assert ("curable", "model.norm") in guilty
    loads = [(found.load, found.slot) for found in traces]
    swaps = find_swaps(sampler, PROBE, 1, groups, loads, Decoding(2))
    assert swaps.smallest is not None, swaps.reason
    assert ("curable", "model.norm") in swaps.smallest
    assert set(swaps.smallest) <= set(guilty)
    assert "planted" not in str(swaps.reason)
    assert any("invariant kernel for" in line for line in advise(groups, traces, swaps))
    assert trace(sampler, (2, 5))[0].introducers == []


def test_swapping_says_where_it_does_not_help(planted_sampler):
    """The invariant kernels leave `follows_rows` as it is."""
    sampler = planted_sampler("follows_rows")
    traces = trace(sampler, (4,), 1, "stock")
    loads = [(found.load, found.slot) for found in traces]
    groups = group_findings(traces)
    # Nothing else is swapped either, so no override runs at all if the planted op is alone guilty.
    swaps = find_swaps(sampler, PROBE, 1, groups, loads, Decoding(2))
    assert swaps.smallest is None
    assert any("No set of swaps" in line for line in advise(groups, traces, swaps))


def test_screen_and_document(planted_sampler):
    traces = trace(planted_sampler("follows_rows"), (2, 4))
    explanation = Explanation(1, traces, None)
    text = "\n".join(trace_lines("tiny", [explanation], 80))
    assert "step 1 (decode), 2, 4 rows: FOUND follows_rows" in text
    assert "norm" in text
    assert "1-2 | 4" in text
    assert max(map(len, text.splitlines())) <= 80
    document = trace_document({"model": "tiny"}, [explanation])
    (step,) = document["steps"]
    assert step["counts"]["introduces"] == 1
    assert step["loads"][0]["first_difference"] is None
    assert step["loads"][1]["first_difference"]["op"] == "follows_rows"
    assert explanation.exit_code == 1


def test_bits_other_than_those_recorded_are_a_doubt(sampler):
    traces = trace(sampler, (2,))
    assert Explanation(1, traces, None, traces[0].logits_digest).exit_code == 0
    assert Explanation(1, traces, None, "0" * 16).exit_code == 3


def test_a_chunked_prefill_has_no_counterpart_alone(sampler):
    tracer = Tracer(sampler, PROBE, 0)
    alone = tracer.record_alone()
    with pytest.raises(UsageError, match="--step 1"):
        tracer.trace(Load(1, cache_state="chunked"), 0, alone)
    later = Tracer(sampler, PROBE, 1)
    found = later.trace(Load(1, cache_state="chunked"), 0, later.record_alone())
    assert not found.introducers
    with pytest.raises(UsageError, match="context"):
        Tracer(sampler, PROBE, 100_000)
