"""A completion fed again: in the passes asked for, compared token by token, faults at any width."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ndcheck.records import ALONE, Decoding, Fault, Load, Probe, Trial
from ndcheck.request import DEFAULTS
from ndcheck.runner import fit_spec
from ndcheck.samplers.local.decoding import steps
from ndcheck.samplers.local.decoding.selection import read_pass
from ndcheck.samplers.local.sampler import TransformersSampler

PROBE = Probe("p1", "tell me about the order of a sum")
N_TOKENS = 18
GREEDY = Decoding(N_TOKENS)
SPEC = replace(
    DEFAULTS,
    probes=(PROBE,),
    decoding=GREEDY,
    batch_sizes=(1, 2),
    axes=("width", "scoring"),
    n_samples=26,
    arms=("invariant",),
    dtype="fp32",
)
COPIES = (ALONE, Load(3, (0, 1, 2)))


@pytest.fixture(scope="module")
def sampler(tiny_models):
    return TransformersSampler(replace(SPEC, model=str(tiny_models["qwen3"])))


def sample(sampler, load, arm="invariant", decoding=GREEDY, fault=None):
    return sampler.sample(Trial(0, arm, "p1", "width", load, 0, fault=fault), PROBE, decoding)


def untimed(sample):
    """A sample without its time, and without how many ops had an override."""
    return replace(sample, elapsed_s=0, witness=replace(sample.witness, override_fires=None))


def passes_of(sampler, load):
    """The columns of every pass that a load sends through the model, its completion being known."""
    sample(sampler, load.decoded)
    seen: list[int] = []

    def note(module, args, kwargs):
        seen.append(kwargs["input_ids"].shape[1])

    hook = sampler.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        sample(sampler, load)
    finally:
        hook.remove()
    return seen


def failing(verdict):
    return {axis for axis, judged in verdict.axes.items() if judged.outcome == "FAIL"}


@pytest.mark.parametrize("base", COPIES)
@pytest.mark.parametrize("kind", [{"width": 2}, {"width": 5}, {"width": 16}, {"scores": True}])
def test_the_invariant_arm_gives_every_token_the_bits_it_was_decoded_with(sampler, base, kind):
    decoded = sample(sampler, base)
    fed = sample(sampler, replace(base, **kind))
    for ours, theirs in zip(fed, decoded, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.row_digests == theirs.row_digests
        assert ours.logprobs == theirs.logprobs
        assert (ours.fed.n_tokens, ours.fed.n_other_bits, ours.fed.n_other_tokens) == (18, 0, 0)
        assert ours.fed.digest == ours.fed.decoded_digest
        assert theirs.fed is None


@pytest.mark.parametrize("arm", ["stock", "invariant"])
@pytest.mark.parametrize("fault", [None, Fault(3, 9)])
@pytest.mark.parametrize("kind", [{"width": 5}, {"scores": True}])
@pytest.mark.parametrize("base", [ALONE, Load(3, (1,), (5, 40), 7)])
def test_a_pass_read_at_once_gives_what_its_positions_give(
    sampler, base, kind, fault, arm, monkeypatch
):
    load, n_read = replace(base, **kind), []

    def read(logits, *rest):
        n_read.append(logits.shape[1])
        return read_pass(logits, *rest)

    def feed(self, *arguments):
        self._reads_passes = True  # As on a GPU.
        return own(self, *arguments)

    one_by_one = sample(sampler, load, arm, fault=fault)
    own = steps.DecodeSteps.feed
    monkeypatch.setattr(steps.DecodeSteps, "feed", feed)
    monkeypatch.setattr(steps, "read_pass", read)
    at_once = sample(sampler, load, arm, fault=fault)
    assert n_read if fault is None or "width" in kind else not n_read
    for one, other in zip(one_by_one, at_once, strict=True):
        assert untimed(one) == untimed(other)


@pytest.mark.parametrize("cut", [None, 1, 4, 7])
def test_so_it_does_where_prompt_and_completion_enter_in_chunks(sampler, cut):
    (decoded,) = sample(sampler, ALONE)
    load = Load(1, scores=True, cache_state="chunked", cut=cut)
    (fed,) = sample(sampler, load)
    assert (fed.row_digests, fed.fed.n_other_bits) == (decoded.row_digests, 0)


def test_the_passes_have_the_columns_asked_for(sampler):
    n_prompt = sampler.count_tokens(PROBE.prompt)
    assert passes_of(sampler, Load(1, width=5)) == [n_prompt, 5, 5, 5, 2]
    assert passes_of(sampler, Load(1, scores=True)) == [n_prompt + 17]
    chunked = Load(1, scores=True, cache_state="chunked", cut=n_prompt + 10)
    assert passes_of(sampler, chunked) == [n_prompt + 10, 7]


def test_another_token_ends_the_sample_and_all_are_counted(sampler, wide):
    """From four columns on, the last column of a pass has its logits turned round."""
    (decoded,) = sample(sampler, ALONE)

    def turn(logits, n_columns):
        if n_columns not in (4, 5):
            return logits
        return torch.cat((logits[:, :-1], -logits[:, -1:]), dim=1)

    wide(sampler, turn)
    (fed,) = sample(sampler, Load(1, width=4))
    # The first token comes from the prompt; then each fourth is another.
    assert fed.token_ids[:4] == decoded.token_ids[:4]
    assert fed.token_ids[4] != decoded.token_ids[4]
    assert len(fed.token_ids) == len(fed.token_texts) == 5
    assert (fed.fed.n_tokens, fed.fed.n_other_bits, fed.fed.n_other_tokens) == (18, 4, 4)
    sampler._completions.clear()  # As where many batches were decoded since: it is decoded again.
    (again,) = sample(sampler, Load(1, width=4))
    assert (again.token_ids, again.fed) == (fed.token_ids, fed.fed)
    (fed,) = sample(sampler, Load(1, width=3))
    assert (fed.token_ids, fed.fed.n_other_bits) == (decoded.token_ids, 0)


def test_widths_fall_into_the_classes_that_were_planted(sampler, tmp_path, measure, wide):
    classes = {2: 1.0, 3: 1.0, 4: 1.0, 5: 1.5, 8: 1.5, 16: 2.0}

    def stretch(logits, n_columns):
        return logits * classes.get(n_columns, 1.0)

    spec = replace(SPEC, axes=("width",))
    clean, probe, _ = measure(sampler, tmp_path / "clean", spec)
    assert clean.judgement.verdict.outcome == "PASS", clean.judgement.verdict.reasons
    assert dict(width(probe).tokens.width_classes)[1] == ((1, 2, 3, 4, 5, 8, 16),)
    wide(sampler, stretch)
    _, probe, verdict = measure(sampler, tmp_path / "planted", spec)
    assert failing(verdict) == {"width"}
    alone, others = dict(width(probe).tokens.width_classes)[1], width(probe).tokens
    assert alone == ((1, 2, 3, 4), (5, 8), (16,))
    # Alone: all 15 of three full passes of 5, 16 of two of 8, and 16 of one of 16.
    assert others.n_other_bits >= 15 + 16 + 16
    assert others.n_other_tokens == 0
    assert "alone 1-4 | 5-8 | 16" in " ".join(verdict.axes["width"].reasons)


def width(probe):
    return next(finding for finding in probe.axes if finding.axis == "width")


def test_a_fault_of_long_passes_is_laid_to_scoring(sampler, tmp_path, measure, wide):
    n_prompt = sampler.count_tokens(PROBE.prompt)

    def stretch(logits, n_columns):
        return logits * (1.5 if n_columns > max(16, n_prompt) else 1.0)

    wide(sampler, stretch)
    _, _, verdict = measure(sampler, tmp_path / "run")
    assert failing(verdict) == {"scoring"}


@pytest.mark.parametrize("kind", [{"width": 3}, {"scores": True}])
def test_a_planted_fault_shows_in_a_fed_pass(sampler, kind):
    (clean,), (planted,) = (
        sample(sampler, Load(1, **kind), fault=fault) for fault in (None, Fault(4, 9))
    )
    assert clean.token_ids[:9] == planted.token_ids[:9]
    assert clean.token_ids[9] != planted.token_ids[9]
    differs = [a != b for a, b in zip(clean.row_digests, planted.row_digests, strict=False)]
    assert [at for at, is_other in enumerate(differs) if is_other] == [4, 9]


def test_a_draw_above_temperature_zero_is_the_same_fed_again(sampler):
    decoding = Decoding(N_TOKENS, temperature=1.0, seed=3)
    (decoded,) = sample(sampler, ALONE, decoding=decoding)
    (fed,) = sample(sampler, Load(1, width=4), decoding=decoding)
    assert (fed.token_ids, fed.row_digests) == (decoded.token_ids, decoded.row_digests)


def test_a_sampler_that_begins_with_a_fed_load_decodes_it_first(sampler, tiny_models):
    fresh = TransformersSampler(replace(SPEC, model=str(tiny_models["qwen3"])))
    (fed,) = sample(fresh, Load(1, width=4))
    (known,) = sample(sampler, Load(1, width=4))
    assert fed.token_ids == known.token_ids
    assert fed.fed == known.fed


def test_completions_that_are_too_short_leave_the_axes_out(sampler):
    spec = replace(SPEC, axes=DEFAULTS.axes, decoding=Decoding(2))
    assert set(DEFAULTS.axes) - set(fit_spec(spec, sampler).axes) == {"width"}
    spec = replace(spec, decoding=Decoding(1))
    assert set(DEFAULTS.axes) - set(fit_spec(spec, sampler).axes) == {"width", "scoring"}
