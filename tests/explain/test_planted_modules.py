"""Faults planted in a module of a model that is otherwise exact row by row: named, and no other."""

from __future__ import annotations

import contextlib
import itertools
import types
import unittest.mock
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ndcheck.explain.advice import advise
from ndcheck.explain.swapping import find_swaps
from ndcheck.explain.traced import group_findings
from ndcheck.explain.tracing import Tracer
from ndcheck.records import Decoding, Load, Probe
from ndcheck.reports.explain.trace import Explanation, trace_document, trace_lines
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.sampler import TransformersSampler

PROBE = Probe("p1", "tell me about the order")


def multiply(x, weight):
    """A product that iterates over its rows, each summed in one order: no batch can change it."""
    rows = x.reshape(-1, x.shape[-1])
    return torch.stack([(row * weight).sum(-1) for row in rows]).view(*x.shape[:-1], -1)


def exact(module, x):
    return multiply(x, module.weight)


def attend(query, key, value, attn_mask=None, is_causal=False, sdpa=F.scaled_dot_product_attention,
           **options):  # fmt: skip
    """Row by row over its own tokens alone: torch's own sums follow the padding on some CPUs."""
    rows = []
    for n, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
        seen = slice(0, k.shape[1])
        if attn_mask is not None:  # What the last query sees is the row.
            (columns,) = attn_mask[n % len(attn_mask), 0, -1].nonzero(as_tuple=True)
            seen = slice(int(columns[0]), int(columns[-1]) + 1)
        k, v = k[:, seen], v[:, seen]
        q = q[:, -k.shape[1] :]
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        out = sdpa(q[None], k[None], v[None], visible.tril(k.shape[1] - q.shape[1]), **options)
        rows.append(F.pad(out, (0, 0, query.shape[2] - q.shape[1], 0)))
    return torch.cat(rows)


def split(module, x):
    """Another order of addition, by the number of rows, in another number of calls."""
    parts = zip(x.chunk(len(x), -1), module.weight.chunk(len(x), -1), strict=True)
    return sum(multiply(part, weight) for part, weight in parts)


def neighbours(module, x):
    y = multiply(x, module.weight)
    return y + 1e-3 * (y.sum(0, keepdim=True) - y)


def chance(module, x):
    y = multiply(x, module.weight)
    return y * (1 + 1e-3 * torch.rand_like(y)) if len(x) > 1 else y


def hidden(module, x):
    """Outside of torch: no op is to be seen that does it."""
    y = multiply(x, module.weight)
    if len(x) > 1:
        array = y.numpy()
        array *= 1.001
    return y


def dead(module, x):
    """A sum over the batch that nobody uses, as statistics of a router's load are."""
    y = multiply(x, module.weight)
    module.statistics = y.logsumexp(0)
    return y


CAUSES = {"split": "shape", "neighbours": "neighbours", "chance": "chance", "hidden": "shape"}
FAULTS = {function.__name__: function for function in (split, neighbours, chance, hidden, dead)}
LINEARS = (
    *(f"model.layers.{n}.self_attn.{name}_proj" for n in (0, 1) for name in "qkvo"),
    *(f"model.layers.{n}.mlp.{name}_proj" for n in (0, 1) for name in ("gate", "up", "down")),
    "lm_head",
)


@pytest.fixture(scope="module")
def sampler(tiny_models):
    return TransformersSampler(replace(DEFAULTS, model=str(tiny_models["llama"]), dtype="fp32"))


@contextlib.contextmanager
def forwards(model, chosen):
    """Linear layers compute `exact`, but those named in ``chosen`` as it says; and `attend`."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    modules = {**linears, **{name: model.get_submodule(name) for name in chosen}}
    for name, module in modules.items():
        module.forward = types.MethodType(chosen.get(name, exact), module)
    try:
        with unittest.mock.patch.object(F, "scaled_dot_product_attention", attend):
            yield
    finally:
        for module in modules.values():
            del module.forward


def trace(sampler, loads, step):
    tracer = Tracer(sampler, PROBE, step)
    alone = tracer.record_alone()
    return [tracer.trace(load, load.slots[-1], alone) for load in loads]


def load_of(sampler, size, mode, extra, seed):
    length = sampler.count_tokens(PROBE.prompt)
    if mode == "copies":
        return Load(size, tuple(range(size)))
    return Load(size, (size // 2,), (length + extra,) * (size - 1), seed)


def explain(traces):
    explanation = Explanation(traces[0].step, traces, None)
    return explanation, "\n".join(trace_lines("tiny", [explanation], 80))


loads = st.builds(
    lambda size, mode, extra, seed: (size, mode, extra, seed),
    st.integers(2, 5),
    st.sampled_from(["copies", "mixed"]),
    st.integers(-3, 4),
    st.integers(0, 1000),
)
few = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@few
@given(st.sampled_from(sorted(CAUSES)), st.sampled_from(LINEARS), loads, st.integers(0, 2))
def test_the_planted_module_and_no_other_is_found(sampler, fault, place, load, step):
    load = load_of(sampler, *load)
    with forwards(sampler.model, {place: FAULTS[fault]}):
        (found,) = traces = trace(sampler, [load], step)
    explanation, text = explain(traces)
    guilty = {finding.module: finding.cause for finding in found.introducers}
    if found.logits_differ and not found.cache_reaches_logits:
        assert guilty == {place: CAUSES[fault]}, text
        assert found.doubt is None
        assert "FOUND Linear" in text
        assert place.removeprefix("model.") in text
        assert explanation.exit_code == 1
    elif found.logits_differ:
        # The keys and values of earlier passes differ too, and may be all that does.
        assert guilty.items() <= {place: CAUSES[fault]}.items(), text
        assert explanation.exit_code == 1
    else:
        assert not guilty
        assert "FOUND" not in text
        assert explanation.exit_code in (0, 3)


@few
@given(loads, st.integers(0, 2))
def test_a_model_that_iterates_over_its_rows_is_not_accused(sampler, load, step):
    load = load_of(sampler, *load)
    with forwards(sampler.model, {}):
        traces = trace(sampler, [load], step)
    explanation, text = explain(traces)
    assert explanation.exit_code == 0, text
    assert "CLEAN" in text
    assert explanation.advice == []
    assert traces[0].n_not_compared == 0


def test_memory_that_nothing_has_written_is_no_result(sampler):
    def copied(module, x):
        y = exact(module, x)
        return torch.empty_like(y).copy_(y)

    with forwards(sampler.model, {"model.layers.1.mlp.down_proj": copied}):
        traces = trace(sampler, [load_of(sampler, 3, "copies", 0, 0)], 1)
    assert not any("empty" in finding.op for finding in traces[0].findings)
    assert explain(traces)[0].exit_code == 0


def test_a_single_number_of_any_stride_is_compared(sampler):
    def first_alone(module, x):
        y = exact(module, x)
        y[..., 0] *= 1.001 if len(x) > 1 else 1
        return y

    with forwards(sampler.model, {"model.layers.1.mlp.down_proj": first_alone}):
        (found,) = traces = trace(sampler, [load_of(sampler, 3, "copies", 0, 0)], 1)
    assert {finding.module for finding in found.introducers} == {"model.layers.1.mlp.down_proj"}
    assert explain(traces)[0].exit_code == 1


@pytest.mark.parametrize("step", [0, 1])
def test_what_no_logit_follows_is_not_found(sampler, step):
    load = load_of(sampler, 3, "copies", 0, 0)
    with forwards(sampler.model, {"model.layers.1.mlp.up_proj": dead}):
        traces = trace(sampler, [load], step)
    explanation, text = explain(traces)
    silent = [f for f in traces[0].findings if f.status == "introduces"]
    assert [(f.op, f.module) for f in silent] == [("logsumexp", "model.layers.1.mlp.up_proj")]
    assert explanation.exit_code == 0
    assert "does not reach them" in text


def test_beside_what_reaches_the_logits_the_rest_is_not_named(sampler):
    load = load_of(sampler, 3, "copies", 0, 0)
    chosen = {"model.layers.1.mlp.up_proj": dead, "model.layers.1.mlp.down_proj": neighbours}
    with forwards(sampler.model, chosen):
        traces = trace(sampler, [load], 1)
    assert {f.module for f in traces[0].introducers} == {"model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize("step", [0, 1])
def test_what_the_model_itself_does_is_inconclusive(sampler, step):
    """Nothing smaller than the whole model can be blamed: it could not be looked at."""
    inner = type(sampler.model.model).forward

    def forward(self, *args, **kwargs):
        output = inner(self, *args, **kwargs)
        if len(output.last_hidden_state) > 1:
            output.last_hidden_state.numpy()[...] *= 1.001
        return output

    with forwards(sampler.model, {"model": forward}):
        traces = trace(sampler, [load_of(sampler, 2, "copies", 0, 0)], step)
    explanation, text = explain(traces)
    assert explanation.exit_code == 3
    assert "INCONCLUSIVE" in text
    assert "No op adds" not in text
    assert not explanation.finds


def test_a_fault_in_the_attention_itself_is_laid_to_it(sampler):
    """Between ops of a module that has others in it, and where the cache is an argument."""
    attention = sampler.model.model.layers[1].self_attn
    inner = type(attention).forward

    def forward(self, *args, **kwargs):
        output, *rest = inner(self, *args, **kwargs)
        if len(output) > 1:
            output.numpy()[...] *= 1.001
        return (output, *rest)

    with forwards(sampler.model, {"model.layers.1.self_attn": forward}):
        traces = trace(sampler, [load_of(sampler, 3, "mixed", 2, 0)], 1)
    explanation, text = explain(traces)
    assert [(f.op, f.module) for f in traces[0].introducers] == [
        ("LlamaAttention", "model.layers.1.self_attn")
    ], text
    assert explanation.exit_code == 1


def averaged(module, x):
    """The mean over rows of equal contents is that of one."""
    y = multiply(x, module.weight)
    return y - 1e-3 * y.mean(0, keepdim=True)


def test_what_copies_hide_is_seen_beside_others(sampler):
    load = load_of(sampler, 4, "copies", 0, 0)
    with forwards(sampler.model, {"model.layers.1.mlp.down_proj": averaged}):
        tracer = Tracer(sampler, PROBE, 1)
        alone = tracer.record_alone()
        assert not tracer.trace(load, 3, alone).logits_differ
        found = tracer.trace(load, 3, alone, varies=True)
    (guilty,) = found.introducers
    assert (guilty.module, guilty.cause) == ("model.layers.1.mlp.down_proj", "neighbours")


def test_every_other_pass_is_not_laid_to_the_cache(sampler):
    """Put right or not, the cache is not what differs between a pass and the next."""
    n_calls = itertools.count()

    def every_other(module, x):
        return multiply(x, module.weight) * (1 + 1e-3 * (len(x) > 1 and next(n_calls) % 2))

    with forwards(sampler.model, {"model.layers.1.mlp.down_proj": every_other}):
        (found,) = traces = trace(sampler, [load_of(sampler, 2, "copies", 0, 0)], 1)
    _, text = explain(traces)
    assert not found.cache_reaches_logits
    assert "KV cache" not in text


def test_a_draw_that_comes_seldom_is_not_laid_to_watching(sampler):
    """It hits the watched pass, and the next but one repeat of it."""
    hits, n_calls = {1, 4}, itertools.count(1)

    def seldom(module, x):
        is_hit = len(x) > 1 and next(n_calls) in hits
        return multiply(x, module.weight) * (1 + 1e-3 * is_hit)

    tracer = Tracer(sampler, PROBE, 0)
    with forwards(sampler.model, {"model.layers.1.mlp.down_proj": seldom}):
        found = tracer.trace(load_of(sampler, 2, "copies", 0, 0), 1, tracer.record_alone())
    assert found.is_random
    assert not found.tracing_changed_bits


def test_a_pass_alone_that_does_not_repeat_leaves_a_doubt(sampler):
    """The row alone is computed otherwise once a larger batch has been there."""
    largest = [0]

    def stale(module, x):
        largest[0] = max(largest[0], len(x))
        return multiply(x, module.weight) * (1 + 1e-3 * (len(x) < largest[0]))

    with forwards(sampler.model, {"model.layers.1.mlp.down_proj": stale}):
        tracer = Tracer(sampler, PROBE, 1)
        alone = tracer.record_alone()
        assert tracer.repeats(alone)
        found = tracer.trace(load_of(sampler, 2, "copies", 0, 0), 1, alone)
        repeats = tracer.repeats(alone)
    assert not repeats
    explanation = Explanation(1, [found], None, None, repeats)
    assert explanation.exit_code == 3
    assert "CLEAN" not in "\n".join(trace_lines("tiny", [explanation], 80))
    assert "the pass alone gives other bits" in explanation.doubt


def test_random_draws_are_no_matter_for_batch_invariant_kernels(sampler):
    load = load_of(sampler, 2, "copies", 0, 0)
    with forwards(sampler.model, {"model.layers.0.mlp.down_proj": chance}):
        traces = trace(sampler, [load], 1)
        groups = group_findings(traces)
        swaps = find_swaps(sampler, PROBE, 1, groups, [(load, 1)], Decoding(2))
    assert traces[0].is_random
    assert not traces[0].tracing_changed_bits
    sentences = advise(groups, traces, swaps)
    assert any("cure neither" in sentence for sentence in sentences)
    assert not any("--kernels stock,invariant" in sentence for sentence in sentences)
    explanation = Explanation(1, traces, swaps, "0" * 16)
    assert "every repetition" in explanation.doubt


@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_pass_that_watching_changes_proves_nothing(sampler, n_rows):
    """Alone or in the batch: the control of the trace itself."""

    def shy(module, x):
        y = multiply(x, module.weight)
        is_watched = torch.utils._python_dispatch._get_current_dispatch_mode() is not None
        return y * 1.001 if is_watched and len(x) == n_rows else y

    with forwards(sampler.model, {"model.layers.1.mlp.down_proj": shy}):
        traces = trace(sampler, [load_of(sampler, 3, "copies", 0, 0)], 1)
    explanation, text = explain(traces)
    assert explanation.exit_code == 3
    assert "INCONCLUSIVE, the logits are others when the pass is watched" in " ".join(text.split())
    assert "FOUND" not in text


def test_the_document_says_what_was_seen(sampler):
    load = load_of(sampler, 3, "copies", 0, 0)
    with forwards(sampler.model, {"model.layers.1.mlp.down_proj": hidden}):
        traces = trace(sampler, [load], 1)
    (step,) = trace_document({}, [explain(traces)[0]])["steps"]
    (group,) = step["groups"]
    assert (group["where"], group["is_module"], group["reaches_logits"]) == (
        "model.layers.1.mlp.down_proj",
        True,
        True,
    )
    assert step["counts"]["not compared"] == 0
    assert step["loads"][0]["is_accounted_for"] is True
